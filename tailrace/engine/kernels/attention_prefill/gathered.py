"""For CPUs: one indexed copy of the blocks before the chunk's end, then torch's fused attention."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tailrace.engine.kernels.gather import gather_rows, gathered


@dataclass(frozen=True, slots=True)
class ChunkSpan:
    """One chunk of one step, for one kind of layer."""

    rows: Tensor | None
    """Of gather_rows; None: the chunk has nothing before it and is all that is read."""
    num_keys: int
    """Of the gathered tokens, those up to the chunk's end."""
    mask: Tensor | None
    """[tokens, num_keys], 0 or -inf in the pool's dtype; None: plainly causal."""


def chunk_span(
    pool: Tensor,  # [num_blocks, layers, 2, kv_heads, block, head_dim]
    table: Tensor,  # [max_blocks] int32; entries past the chunk's end may be anything
    start: int,
    end: int,
    window: int,
) -> ChunkSpan:
    """Only blocks that some token of the chunk looks at are read."""
    if start == 0 and not 0 < window < end:
        return ChunkSpan(None, end, None)
    block = pool.shape[4]
    first_block = max(0, start - window + 1) // block if window else 0
    rows = gather_rows(pool, table[first_block : -(-end // block)].long().unsqueeze(0))
    mask = _mask(first_block * block, start, end, window, pool.device)
    return ChunkSpan(rows, mask.shape[1], mask.to(pool.dtype))


def _mask(first: int, start: int, end: int, window: int, device: torch.device) -> Tensor:
    at = torch.arange(start, end, device=device).unsqueeze(1)
    key_at = torch.arange(first, end, device=device)
    hidden = key_at > at
    if window:
        hidden |= key_at <= at - window
    return torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -torch.inf)


def attention_prefill(
    query: Tensor,  # [tokens, heads, head_dim]
    keys_values: Tensor,  # [tokens, 2 * kv_heads, head_dim]: the chunk's own, in the pool as well
    pool: Tensor,  # [num_blocks, layers, 2, kv_heads, block, head_dim]
    layer: int,
    span: ChunkSpan,
) -> Tensor:  # [tokens, heads, head_dim]
    """As naive.attention_prefill."""
    tokens, _, head_dim = query.shape
    kv_heads = pool.shape[3]
    if span.rows is None:
        keys, values = keys_values.view(tokens, 2, kv_heads, head_dim).permute(1, 2, 0, 3)
    else:
        all_keys, all_values = gathered(pool, layer, span.rows, 1)
        keys, values = all_keys[0, :, : span.num_keys], all_values[0, :, : span.num_keys]
    # [kv_heads, group, tokens, head_dim]: key heads stand for the batch, and an expanded dimension repeats nothing.
    grouped = query.view(tokens, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    shape = (-1, grouped.shape[1], -1, -1)
    out = F.scaled_dot_product_attention(
        grouped,
        keys.unsqueeze(1).expand(shape),
        values.unsqueeze(1).expand(shape),
        attn_mask=span.mask,
        is_causal=span.mask is None,
    )
    return out.permute(2, 0, 1, 3).flatten(1, 2)

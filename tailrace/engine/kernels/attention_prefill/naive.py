"""The spec: all scores at once, in float32."""

import torch
from torch import Tensor


def attention_prefill(
    query: Tensor,  # [tokens, heads, head_dim], of the tokens at start, start + 1, ...
    pool: Tensor,  # [num_blocks, layers, 2, kv_heads, block, head_dim], holding the chunk's own tokens already
    layer: int,
    table: Tensor,  # [max_blocks] integer; entries past the chunk's end are never looked at
    start: int,
    window: int,  # 0: all tokens up to its own; else the last `window` of them
) -> Tensor:  # [tokens, heads, head_dim]
    """Causal softmax(q k / sqrt(head_dim)) v; heads share key heads in consecutive groups."""
    tokens, heads, head_dim = query.shape
    kv_heads, block = pool.shape[3], pool.shape[4]
    end = start + tokens
    blocks = table[: -(-end // block)].long()
    keys, values = pool[blocks, layer].float().permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :end]
    at, key_at = torch.arange(start, end).unsqueeze(1), torch.arange(end)
    hidden = key_at > at
    if window:
        hidden |= key_at <= at - window
    grouped = query.float().view(tokens, kv_heads, heads // kv_heads, head_dim).permute(1, 2, 0, 3)
    scores = (grouped @ keys.transpose(1, 2).unsqueeze(1) * head_dim**-0.5).masked_fill(
        hidden.to(query.device), -torch.inf
    )
    out: Tensor = torch.softmax(scores, dim=-1) @ values.unsqueeze(1)
    return out.permute(2, 0, 1, 3).reshape(tokens, heads, head_dim).to(query.dtype)

"""For CPUs: one indexed copy of the blocks before the chunk's end, then attention tile by tile of queries.

Scores are float32 products whatever the dtype; what is behind a tile's last query is not computed at all. Measured at
1,024 tokens with SmolLM2-135M's heads, one thread: 1.7 times the speed of torch's fused attention in bfloat16, 1.3 in
float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tailrace.engine.kernels.gather import gather_rows, gathered

# Scores of a tile stay in the processor's cache: of 32 to 256 this was the fastest in both dtypes (measured).
_TILE = 64


@dataclass(frozen=True, slots=True)
class _Tile:
    """Queries [begin, end) of the chunk against the read keys [first_key, last_key)."""

    begin: int
    end: int
    first_key: int
    last_key: int
    mask: Tensor
    """[queries, masked keys] float32, 0 or -inf, for the last keys of the tile; it sees all those before them."""


@dataclass(frozen=True, slots=True)
class ChunkSpan:
    """One chunk of one step, for one kind of layer."""

    rows: Tensor | None
    """Of gather_rows; None: the chunk has nothing before it, and its own keys are all there are."""
    tiles: tuple[_Tile, ...]

    def attend(self, query: Tensor, keys_values: Tensor, pool: Tensor, layer: int) -> Tensor:
        return attention_prefill(query, keys_values, pool, layer, self)


def chunk_span(
    pool: Tensor,  # [num_blocks, layers, 2, kv_heads, block, head_dim]
    table: Tensor,  # [max_blocks] int32; entries past the chunk's end may be anything
    start: int,
    end: int,
    window: int,
) -> ChunkSpan:
    """Only blocks that some token of the chunk looks at are read."""
    block = pool.shape[4]
    first_block = max(0, start - window + 1) // block if window else 0
    rows = None
    if start > 0:
        rows = gather_rows(pool, table[first_block : -(-end // block)].long().unsqueeze(0))
    first = first_block * block
    tiles = (_tile(at, min(at + _TILE, end), start, first, window, pool.device) for at in range(start, end, _TILE))
    return ChunkSpan(rows, tuple(tiles))


def _tile(at: int, end: int, start: int, first: int, window: int, device: torch.device) -> _Tile:
    """Positions [at, end) of a chunk that begins at `start`, where the keys read begin at position `first`."""
    from_key = max(first, at - window + 1) if window else first
    # Without a window only the square of the tile's own tokens needs a mask.
    masked = torch.arange(from_key if window else at, end, device=device)
    positions = torch.arange(at, end, device=device).unsqueeze(1)
    hidden = masked > positions
    if window:
        hidden |= masked <= positions - window
    mask = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -torch.inf)
    return _Tile(at - start, end - start, from_key - first, end - first, mask)


def attention_prefill(
    query: Tensor,  # [tokens, heads, head_dim]
    keys_values: Tensor,  # [tokens, 2 * kv_heads, head_dim]: the chunk's own, in the pool as well
    pool: Tensor,  # [num_blocks, layers, 2, kv_heads, block, head_dim]
    layer: int,
    span: ChunkSpan,
) -> Tensor:  # [tokens, heads, head_dim]
    """As naive.attention_prefill."""
    tokens, heads, head_dim = query.shape
    kv_heads = pool.shape[3]
    if span.rows is None:
        keys, values = keys_values.view(tokens, 2, kv_heads, head_dim).permute(1, 2, 0, 3)
    else:
        all_keys, all_values = gathered(pool, layer, span.rows, 1)
        keys, values = all_keys[0], all_values[0]
    scaled = query.float() * head_dim**-0.5
    scaled = scaled.view(tokens, kv_heads, heads // kv_heads, head_dim).permute(1, 2, 0, 3)
    columns = keys.float().transpose(1, 2)
    out = torch.empty(kv_heads, heads // kv_heads, tokens, head_dim, dtype=query.dtype, device=query.device)
    for tile in span.tiles:
        _attend(scaled, columns, values, tile, out)
    return out.permute(2, 0, 1, 3).reshape(tokens, heads, head_dim)


def _attend(
    scaled: Tensor,  # [kv_heads, group, tokens, head_dim] float32
    columns: Tensor,  # [kv_heads, head_dim, keys] float32
    values: Tensor,  # [kv_heads, keys, head_dim]
    tile: _Tile,
    out: Tensor,  # [kv_heads, group, tokens, head_dim], rows of the tile are written
) -> None:
    kv_heads, group, _, head_dim = scaled.shape
    keys = slice(tile.first_key, tile.last_key)
    # Heads that share a key head become more rows of one product: nothing is repeated.
    rows = scaled[:, :, tile.begin : tile.end].reshape(kv_heads, -1, head_dim)
    scores = torch.bmm(rows, columns[:, :, keys]).view(kv_heads, group, tile.end - tile.begin, -1)
    scores[..., -tile.mask.shape[1] :].add_(tile.mask)
    weights = torch.softmax(scores, dim=-1).to(values.dtype).view(kv_heads, rows.shape[1], -1)
    attended = torch.bmm(weights, values[:, keys])
    out[:, :, tile.begin : tile.end] = attended.view(kv_heads, group, -1, head_dim)

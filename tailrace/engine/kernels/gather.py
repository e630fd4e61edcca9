"""Reading whole blocks out of the pool, laid out for batched attention."""

import torch
from torch import Tensor


def gather_rows(
    pool: Tensor,  # [num_blocks, layers, 2, kv_heads, block, head_dim]
    tables: Tensor,  # [rows, blocks] int64
) -> Tensor:  # [2 * rows * kv_heads * blocks] int64
    """Indices of (block, layer 0, key or value, head) in the pool seen as rows of one head's tokens of one block."""
    _, layers, _, kv_heads, _, _ = pool.shape
    rows, blocks = tables.shape
    heads = torch.arange(2 * kv_heads, device=tables.device).view(2, 1, kv_heads, 1)
    return (tables.view(1, rows, 1, blocks) * (layers * 2 * kv_heads) + heads).flatten()


def gathered(
    pool: Tensor,  # [num_blocks, layers, 2, kv_heads, block, head_dim]
    layer: int,
    rows: Tensor,  # of gather_rows
    size: int,  # rows of the tables
) -> tuple[Tensor, Tensor]:  # keys, values: [size, kv_heads, blocks * block, head_dim]
    """One contiguous copy of a layer's keys and values."""
    _, _, _, kv_heads, block, head_dim = pool.shape
    flat = pool.view(-1, block * head_dim)[layer * 2 * kv_heads :]
    both = flat.index_select(0, rows).view(2, size, kv_heads, -1, head_dim)
    return both[0], both[1]

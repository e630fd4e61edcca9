"""Writes through a view of the pool as rows of head_dim elements: one indexed store a layer."""

import torch
from torch import Tensor

NO_ROW = -1
"""In place of a row: the token is nobody's, and nothing is written."""


def write_rows(
    pool: Tensor,  # [num_blocks, layers, 2, kv_heads, block, head_dim]
    blocks: Tensor,  # [tokens] int64, the block of each token
    offsets: Tensor,  # [tokens] int64, its place in the block
) -> Tensor:  # [tokens, 2 * kv_heads] int64: rows of layer 0; the same for all layers of a step
    """Where each token's key heads, then value heads, go."""
    _, layers, _, kv_heads, block, _ = pool.shape
    first = blocks * (layers * 2 * kv_heads * block) + offsets
    heads = torch.arange(0, 2 * kv_heads * block, block, device=pool.device)
    return first.unsqueeze(1) + heads


def kv_write(
    pool: Tensor,  # [num_blocks, layers, 2, kv_heads, block, head_dim], changed in place
    layer: int,
    rows: Tensor,  # [tokens, 2 * kv_heads] int64, of write_rows; all NO_ROW for a token that is not written
    keys_values: Tensor,  # [tokens, 2 * kv_heads, head_dim]: key heads, then value heads
) -> None:
    """Stores a layer's new keys and values; every other element of the pool stays as it is."""
    _, _, _, kv_heads, block, head_dim = pool.shape
    flat = pool.view(-1, head_dim)[layer * 2 * kv_heads * block :]
    is_written = rows[:, 0] != NO_ROW
    if not is_written.all():
        rows, keys_values = rows[is_written], keys_values[is_written]
    flat.index_put_((rows,), keys_values)

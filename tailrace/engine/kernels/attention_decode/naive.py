"""The spec: one sequence at a time, in float32."""

import torch
from torch import Tensor


def attention_decode(
    query: Tensor,  # [rows, heads, head_dim]
    pool: Tensor,  # [num_blocks, layers, 2, kv_heads, block, head_dim]
    layer: int,
    tables: Tensor,  # [rows, max_blocks] integer; entries past a row's length are never looked at
    lengths: Tensor,  # [rows] integer: cached tokens, the query's own included
    window: int,  # 0: all of them; else the last `window`
) -> Tensor:  # [rows, heads, head_dim]
    """softmax(q k / sqrt(head_dim)) v, zeros for a row of length 0; heads share key heads in consecutive groups."""
    rows, heads, head_dim = query.shape
    block, kv_heads = pool.shape[4], pool.shape[3]
    out = torch.empty_like(query)
    for row in range(rows):
        length = int(lengths[row])
        first = max(0, length - window) if window else 0
        table = tables[row, : -(-length // block)].long()
        keys, values = pool[table, layer].float().permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, first:length]
        grouped = query[row].float().view(kv_heads, heads // kv_heads, head_dim)
        weights = torch.softmax(grouped @ keys.transpose(1, 2) * head_dim**-0.5, dim=-1)
        out[row] = (weights @ values).view(heads, head_dim).to(query.dtype)
    return out

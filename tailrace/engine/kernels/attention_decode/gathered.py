"""For CPUs: gathers the blocks of many rows with one indexed copy, then attends to all of them at once."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tailrace.engine.kernels.gather import gather_rows, gathered

# Rows are gathered together until their keys and values reach this: more would fall out of the processor's cache
# between the copy and its use.
_GROUP_BYTES = 3 << 20
# A row joins a group only if it is at least this share as long as the longest one: the rest is padding.
_MIN_FILL = 0.5


@dataclass(frozen=True, slots=True)
class _Group:
    members: Tensor | None
    """[size] int64, rows of the step in this group; None: all rows, in order."""
    size: int
    rows: Tensor
    """[2 * size * kv_heads * blocks] int64: rows of the pool to gather, of layer 0."""
    mask: Tensor
    """[size, 1, 1, tokens] float32: 0, or -inf where a row does not look."""


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The decode rows of one step, for one kind of layer."""

    groups: tuple[_Group, ...]

    def attend(self, query: Tensor, pool: Tensor, layer: int) -> Tensor:
        return attention_decode(query, pool, layer, self)


def decode_rows(
    pool: Tensor,  # [num_blocks, layers, 2, kv_heads, block, head_dim]
    tables: Tensor,  # [rows, max_blocks] int32; entries past a row's length may be anything
    lengths: Tensor,  # [rows] int64
    host_lengths: list[int],
    window: int,
) -> DecodeRows:
    """Sorts rows into groups of similar length. `host_lengths` equals `lengths`: groups are decided on the host."""
    block = pool.shape[4]
    spans = [_num_blocks(length, window, block) for length in host_lengths]
    token_bytes = 2 * pool.shape[3] * pool.shape[5] * pool.element_size()
    groups = split_rows(spans, max(1, _GROUP_BYTES // (token_bytes * block)))
    if len(groups) == 1:
        return DecodeRows((_group(pool, None, tables, lengths, max(spans), window),))
    return DecodeRows(
        tuple(
            _group(pool, members, tables[members], lengths[members], spans[group[0]], window)
            for group in groups
            for members in (torch.tensor(group, device=tables.device),)
        )
    )


def split_rows(spans: list[int], max_blocks: int) -> list[list[int]]:
    """Rows by falling span (blocks to read), cut where a group grows past `max_blocks` or would be mostly padding."""
    order = sorted(range(len(spans)), key=spans.__getitem__, reverse=True)
    groups: list[list[int]] = []
    widest = 0
    for row in order:
        if groups and (len(groups[-1]) + 1) * widest <= max_blocks and spans[row] >= _MIN_FILL * widest:
            groups[-1].append(row)
        else:
            widest = spans[row]
            groups.append([row])
    return groups


def _num_blocks(length: int, window: int, block: int) -> int:
    first = max(0, length - window) // block if window else 0
    return -(-length // block) - first


def _group(
    pool: Tensor, members: Tensor | None, tables: Tensor, lengths: Tensor, num_blocks: int, window: int
) -> _Group:
    block = pool.shape[4]
    lengths = lengths.unsqueeze(1)
    columns = torch.arange(num_blocks, device=tables.device)
    positions = torch.arange(num_blocks * block, device=tables.device)
    if window:
        first = (lengths - window).clamp_(min=0)
        columns = columns + first // block
        positions = positions + first // block * block
        hidden = (positions >= lengths) | (positions < first)
    else:
        hidden = positions >= lengths
    # Past its own blocks a row reads its last one again: some block must be read, and that one is its own.
    columns = torch.minimum(columns, (lengths - 1) // block)
    mask = torch.zeros(hidden.shape, device=tables.device).masked_fill_(hidden, -torch.inf)
    rows = gather_rows(pool, tables.gather(1, columns).long())
    return _Group(members, lengths.shape[0], rows, mask[:, None, None])


def attention_decode(
    query: Tensor,  # [rows, heads, head_dim]
    pool: Tensor,  # [num_blocks, layers, 2, kv_heads, block, head_dim]
    layer: int,
    rows: DecodeRows,
) -> Tensor:  # [rows, heads, head_dim]
    """As naive.attention_decode."""
    if len(rows.groups) == 1:
        return _attend(query, pool, layer, rows.groups[0])
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for group in rows.groups:
        out[group.members] = _attend(query[group.members], pool, layer, group)
    return out


def _attend(query: Tensor, pool: Tensor, layer: int, group: _Group) -> Tensor:
    keys, values = gathered(pool, layer, group.rows, group.size)
    # Heads that share a key head become its rows: nothing is repeated.
    grouped = query.view(group.size, pool.shape[3], -1, query.shape[-1])
    if group.size == 1 or query.dtype == torch.float32:
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=group.mask)
    else:
        # Half the time of the fused kernel, which repacks keys and values for the few rows it gets here (measured).
        scores = torch.matmul(grouped, keys.transpose(-1, -2)).float().mul_(query.shape[-1] ** -0.5).add_(group.mask)
        out = torch.matmul(torch.softmax(scores, dim=-1).to(query.dtype), values)
    return out.flatten(1, 2)

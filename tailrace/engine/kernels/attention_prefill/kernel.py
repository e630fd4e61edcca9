"""Attention of the chunks of one step in one launch, tile of queries by tile of keys, reading blocks in place.

Dao: FlashAttention-2 (2023). A program attends with one head of up to TILE_Q consecutive tokens of one chunk. Keys that
all its queries see need no mask; only those around the diagonal, or under a window, are compared by position.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tailrace.engine.host_copies import upload
from tailrace.engine.kernels.launch import Launch, dot_precision, power_of_2

_LOG2_E = 1.4426950408889634
_HOPPER = 9


@triton.jit
def _attend(
    summed,  # [TILE_Q, DIMS] float32
    total,  # [TILE_Q] float32
    best,  # [TILE_Q] float32
    queries,  # [TILE_Q, DIMS]
    position,  # [TILE_Q] int32
    keys,  # pointer: of the layer and head, in block 0
    values,  # likewise
    table,  # pointer: [max_blocks] int32
    at,
    end,
    block_stride,
    scale,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE_K: tl.constexpr,
    IS_MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of keys, those at `at` and after; none at or behind `end` is looked at."""
    dim = tl.arange(0, DIMS)
    token = at + tl.arange(0, TILE_K)
    block = tl.load(table + token // BLOCK, mask=token < end, other=0).to(tl.int64)
    place = block * block_stride + (token % BLOCK) * HEAD_DIM
    mask = (token < end)[:, None] & (dim < HEAD_DIM)[None, :]
    key = tl.load(keys + place[:, None] + dim[None, :], mask=mask, other=0.0)
    scores = tl.dot(queries, tl.trans(key), input_precision=PRECISION) * scale
    if IS_MASKED:
        is_seen = (token[None, :] <= position[:, None]) & (token < end)[None, :]
        if WINDOW > 0:
            is_seen &= token[None, :] > position[:, None] - WINDOW
        scores = tl.where(is_seen, scores, -float("inf"))
    largest = tl.maximum(best, tl.max(scores, axis=1))
    if WINDOW > 0:
        # A query may see nothing of the first tiles: any finite number keeps its exponentials at zero.
        largest = tl.maximum(largest, -1e30)
    kept = tl.exp2(best - largest)
    shares = tl.exp2(scores - largest[:, None])
    value = tl.load(values + place[:, None] + dim[None, :], mask=mask, other=0.0)
    summed = summed * kept[:, None]
    summed = tl.dot(shares.to(value.dtype), value, acc=summed, input_precision=PRECISION)
    return summed, total * kept + tl.sum(shares, axis=1), largest


@triton.jit(do_not_specialize=["layer"])
def prefill_kernel(
    out,  # [tokens, heads, head_dim]
    query,  # [tokens, heads, head_dim], heads contiguous
    pool,  # [num_blocks, layers, 2, kv_heads, block, head_dim]
    tables,  # [chunks, max_blocks] int32; entries past a chunk's end are never looked at
    tiles,  # [tiles, 4] int32: chunk, first token of `query`, number of tokens, position of the first one
    layer,
    query_stride,
    table_stride,
    block_stride,
    layer_stride,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # grid: (heads, tiles)
    head = tl.program_id(0)
    tile = tiles + tl.program_id(1).to(tl.int64) * 4
    table = tables + tl.load(tile).to(tl.int64) * table_stride
    count = tl.load(tile + 2)
    start = tl.load(tile + 3)
    offset = tl.arange(0, TILE_Q)
    dim = tl.arange(0, DIMS)
    token = tl.load(tile + 1).to(tl.int64) + offset
    mask = (offset < count)[:, None] & (dim < HEAD_DIM)[None, :]
    place = head * HEAD_DIM + dim[None, :]
    queries = tl.load(query + token[:, None] * query_stride + place, mask=mask, other=0.0)
    kv_head = head // GROUP
    keys = pool + layer.to(tl.int64) * layer_stride + kv_head.to(tl.int64) * (BLOCK * HEAD_DIM)
    values = keys + KV_HEADS * BLOCK * HEAD_DIM

    # [first, seen) is seen by every query, [seen, end) by some.
    end = start + count
    if WINDOW > 0:
        first = tl.maximum(start - WINDOW + 1, 0) // BLOCK * BLOCK
        seen = first
    else:
        first = 0
        seen = (start + 1) // TILE_K * TILE_K
    position = start + offset
    best = tl.full([TILE_Q], -float("inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    summed = tl.zeros([TILE_Q, DIMS], tl.float32)
    for at in range(first, seen, TILE_K):
        summed, total, best = _attend(
            summed, total, best, queries, position, keys, values, table, at, seen, block_stride, scale,
            HEAD_DIM, DIMS, BLOCK, WINDOW, TILE_K, False, PRECISION,
        )  # fmt: skip
    for at in range(seen, end, TILE_K):
        summed, total, best = _attend(
            summed, total, best, queries, position, keys, values, table, at, end, block_stride, scale,
            HEAD_DIM, DIMS, BLOCK, WINDOW, TILE_K, True, PRECISION,
        )  # fmt: skip
    place += token[:, None] * (KV_HEADS * GROUP * HEAD_DIM)
    # A row without a query has seen nothing, maybe.
    total = tl.where(offset < count, total, 1.0)
    tl.store(out + place, (summed / total[:, None]).to(out.dtype.element_ty), mask=mask)


def prefill_launch(
    group: int, kv_heads: int, head_dim: int, block: int, window: int, tile_queries: int, dtype: torch.dtype
) -> Launch:
    dims = power_of_2(head_dim)
    is_wide = dtype == torch.float32
    tile_keys = (32 if dims <= 64 else 16) if is_wide else (64 if dims <= 128 else 32)
    has_many_warps = tile_queries >= 128 or dims > (64 if is_wide else 128)
    return Launch(
        {
            "KV_HEADS": kv_heads,
            "GROUP": group,
            "HEAD_DIM": head_dim,
            "DIMS": dims,
            "BLOCK": block,
            "WINDOW": window,
            "TILE_Q": tile_queries,
            "TILE_K": tile_keys,
            "PRECISION": dot_precision(dtype),
        },
        num_warps=8 if has_many_warps else 4,
        num_stages=2,
    )


def tile_queries(head_dim: int, dtype: torch.dtype, capability: int) -> int:
    """Tokens a program: the most whose queries and sums fit into registers, on devices of this major capability."""
    if dtype == torch.float32:
        return 32
    # From Hopper on queries stay in shared memory.
    return 128 if capability >= _HOPPER and head_dim <= 128 else 64


@dataclass(frozen=True, slots=True)
class PagedSpan:
    """Chunks of one step, for one kind of layer: their tokens lie one after the other in the queries."""

    tables: Tensor
    """[chunks, max_blocks] int32"""
    tiles: Tensor
    """[tiles, 4] int32, as the kernel's"""
    tile_queries: int
    window: int

    def attend(self, query: Tensor, keys_values: Tensor, pool: Tensor, layer: int) -> Tensor:
        """As naive.attention_prefill, chunk by chunk. `keys_values` are in the pool and are read there."""
        tokens, heads, head_dim = query.shape
        _, _, _, kv_heads, block, _ = pool.shape
        assert query.stride()[1:] == (head_dim, 1)
        assert self.tables.stride(1) == 1
        assert all(tensor.is_contiguous() for tensor in (self.tiles, pool))
        out = torch.empty(tokens, heads, head_dim, dtype=query.dtype, device=query.device)
        launch = prefill_launch(
            heads // kv_heads, kv_heads, head_dim, block, self.window, self.tile_queries, pool.dtype
        )
        if tokens:
            prefill_kernel[(heads, len(self.tiles))](
                out=out,
                query=query,
                pool=pool,
                tables=self.tables,
                tiles=self.tiles,
                layer=layer,
                query_stride=query.stride(0),
                table_stride=self.tables.stride(0),
                block_stride=pool.stride(0),
                layer_stride=pool.stride(1),
                scale=head_dim**-0.5 * _LOG2_E,
                **launch.keywords,
            )
        return out


def paged_span(pool: Tensor, tables: Tensor, ranges: Sequence[tuple[int, int]], window: int) -> PagedSpan:
    """`tables` [chunks, max_blocks] int32; `ranges`: each chunk's first position and the one after its last."""
    size = tile_queries(pool.shape[5], pool.dtype, _capability(pool))
    tiles, begin = [], 0
    for chunk, (start, end) in enumerate(ranges):
        for at in range(start, end, size):
            tiles.append((chunk, begin + at - start, min(size, end - at), at))
        begin += end - start
    # Those with most keys first: what runs last is short.
    tiles.sort(key=lambda tile: -tile[3])
    return PagedSpan(tables, upload(tiles, torch.int32, pool.device).view(-1, 4), size, window)


def _capability(pool: Tensor) -> int:
    return torch.cuda.get_device_capability(pool.device)[0] if pool.is_cuda else _HOPPER

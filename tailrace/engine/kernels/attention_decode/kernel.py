"""Split-KV attention that reads blocks in place.

Dao, Haziza, Massa, Sizov: Flash-Decoding for long-context inference (2023). A program attends with all heads that share
one key head, over one of `splits` equal parts of its row's tokens; a second kernel joins the parts. The grid depends on
shapes alone, never on lengths: a captured launch serves whatever lengths the rows have by then, 0 (no row) included.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tailrace.engine.kernels.launch import Launch, dot_precision, power_of_2

# A matrix product of the hardware has at least this many rows.
_MIN_ROWS = 16
_LOG2_E = 1.4426950408889634
# Programs that are wanted for each multiprocessor, the least tokens worth a part of their own, and the most parts.
_PROGRAMS_EACH = 2
_MIN_SPLIT_TOKENS = 128
_MAX_SPLITS = 64
_JOINED_AT_ONCE = 8


@triton.jit(do_not_specialize=["layer"])
def decode_kernel(
    out,  # [rows, heads, head_dim] where SPLITS is 1; else [rows, heads, SPLITS, head_dim] float32
    weights,  # [rows, heads, SPLITS] float32: log2 of the sum of exponentials; unused where SPLITS is 1
    query,  # [rows, heads, head_dim], heads contiguous
    pool,  # [num_blocks, layers, 2, kv_heads, block, head_dim]
    tables,  # [rows, max_blocks] int32; entries past a row's length are never looked at
    lengths,  # [rows] int64
    layer,
    query_stride,
    table_stride,
    block_stride,
    layer_stride,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # grid: (rows, kv_heads, SPLITS)
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    member = tl.arange(0, GROUP_ROWS)
    dim = tl.arange(0, DIMS)
    head = kv_head * GROUP + member
    is_head = member < GROUP
    is_dim = dim < HEAD_DIM

    length = tl.load(lengths + row).to(tl.int32)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    # Whole tiles, so that only the row's last part meets a masked one.
    each = tl.cdiv(tl.cdiv(length - first, TILE), SPLITS) * TILE
    begin = first + split * each
    end = tl.minimum(begin + each, length)

    grouped = tl.load(
        query + row * query_stride + head[:, None] * HEAD_DIM + dim[None, :],
        mask=is_head[:, None] & is_dim[None, :],
        other=0.0,
    )
    keys = pool + layer.to(tl.int64) * layer_stride + kv_head.to(tl.int64) * (BLOCK * HEAD_DIM)
    values = keys + KV_HEADS * BLOCK * HEAD_DIM
    table = tables + row * table_stride

    best = tl.full([GROUP_ROWS], -float("inf"), tl.float32)
    total = tl.zeros([GROUP_ROWS], tl.float32)
    summed = tl.zeros([GROUP_ROWS, DIMS], tl.float32)
    for at in range(begin, end, TILE):
        token = at + tl.arange(0, TILE)
        is_token = token < end
        block = tl.load(table + token // BLOCK, mask=is_token, other=0).to(tl.int64)
        place = block * block_stride + (token % BLOCK) * HEAD_DIM
        mask = is_token[:, None] & is_dim[None, :]
        key = tl.load(keys + place[:, None] + dim[None, :], mask=mask, other=0.0)
        scores = tl.dot(grouped, tl.trans(key), input_precision=PRECISION) * scale
        scores = tl.where(is_token[None, :], scores, -float("inf"))
        largest = tl.maximum(best, tl.max(scores, axis=1))
        kept = tl.exp2(best - largest)
        shares = tl.exp2(scores - largest[:, None])
        value = tl.load(values + place[:, None] + dim[None, :], mask=mask, other=0.0)
        summed = summed * kept[:, None]
        summed = tl.dot(shares.to(value.dtype), value, acc=summed, input_precision=PRECISION)
        total = total * kept + tl.sum(shares, axis=1)
        best = largest

    # An empty part has no sum: it counts as zero, with a weight of zero.
    summed = summed / tl.where(total > 0, total, 1.0)[:, None]
    place = ((row * (KV_HEADS * GROUP) + head) * SPLITS + split)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(out + place, summed.to(out.dtype.element_ty), mask=is_head[:, None] & is_dim[None, :])
    if SPLITS > 1:
        weight = tl.where(total > 0, best + tl.log2(tl.where(total > 0, total, 1.0)), -float("inf"))
        tl.store(weights + (row * (KV_HEADS * GROUP) + head) * SPLITS + split, weight, mask=is_head)


@triton.jit
def join_kernel(
    out,  # [rows, heads, head_dim]
    parts,  # [rows, heads, SPLITS, head_dim] float32
    weights,  # [rows, heads, SPLITS] float32
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    STRIDE: tl.constexpr,
):
    # grid: (rows * heads,)
    row = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, DIMS)
    part = tl.arange(0, PARTS)
    every = tl.load(weights + row * SPLITS + part, mask=part < SPLITS, other=-float("inf"))
    # Finite, so that a row of length 0 becomes zeros.
    best = tl.maximum(tl.max(every, axis=0), -1e30)
    total = tl.sum(tl.exp2(every - best), axis=0)
    summed = tl.zeros([DIMS], tl.float32)
    for at in range(0, SPLITS, STRIDE):
        some = at + tl.arange(0, STRIDE)
        share = tl.exp2(tl.load(weights + row * SPLITS + some, mask=some < SPLITS, other=-float("inf")) - best)
        mask = (some < SPLITS)[:, None] & (dim < HEAD_DIM)[None, :]
        attended = tl.load(parts + (row * SPLITS + some)[:, None] * HEAD_DIM + dim[None, :], mask=mask, other=0.0)
        summed += tl.sum(attended * share[:, None], axis=0)
    joined = summed / tl.where(total > 0, total, 1.0)
    tl.store(out + row * HEAD_DIM + dim, joined.to(out.dtype.element_ty), mask=dim < HEAD_DIM)


def decode_launch(
    group: int, kv_heads: int, head_dim: int, block: int, window: int, splits: int, dtype: torch.dtype
) -> Launch:
    dims = power_of_2(head_dim)
    is_wide = dtype == torch.float32
    return Launch(
        {
            "KV_HEADS": kv_heads,
            "GROUP": group,
            "GROUP_ROWS": max(_MIN_ROWS, power_of_2(group)),
            "HEAD_DIM": head_dim,
            "DIMS": dims,
            "BLOCK": block,
            "WINDOW": window,
            # 16 KiB of keys, and as much of values; products of float32 spill registers beyond 64 x 64.
            "TILE": (64 if dims <= 64 else 16) if is_wide else min(64, 8192 // dims),
            "SPLITS": splits,
            "PRECISION": dot_precision(dtype),
        },
        num_warps=4,
        # The table's entry is a stage ahead of its block: these make two tiles on their way while one is used.
        num_stages=3 if is_wide else 5,
    )


def join_launch(head_dim: int, splits: int) -> Launch:
    return Launch(
        {
            "HEAD_DIM": head_dim,
            "DIMS": power_of_2(head_dim),
            "SPLITS": splits,
            "PARTS": power_of_2(splits),
            "STRIDE": min(_JOINED_AT_ONCE, power_of_2(splits)),
        },
        num_warps=2,
    )


def num_splits(num_programs: int, max_tokens: int, num_processors: int) -> int:
    """Parts of a row such that `num_programs` of one part each would fill the device; it depends on shapes alone."""
    wanted = -(-num_processors * _PROGRAMS_EACH // num_programs)
    return max(1, min(wanted, -(-max_tokens // _MIN_SPLIT_TOKENS), _MAX_SPLITS))


@dataclass(frozen=True, slots=True)
class PagedRows:
    """The decode rows of one step, for one kind of layer."""

    tables: Tensor
    """[rows, max_blocks] int32"""
    lengths: Tensor
    """[rows] int64"""
    window: int
    splits: int

    def attend(self, query: Tensor, pool: Tensor, layer: int) -> Tensor:
        """As naive.attention_decode."""
        rows, heads, head_dim = query.shape
        _, _, _, kv_heads, block, _ = pool.shape
        assert query.stride()[1:] == (head_dim, 1)
        assert self.tables.stride(1) == 1
        assert all(tensor.is_contiguous() for tensor in (self.lengths, pool))
        out = torch.empty(rows, heads, head_dim, dtype=query.dtype, device=query.device)
        if not rows:
            return out
        launch = decode_launch(heads // kv_heads, kv_heads, head_dim, block, self.window, self.splits, pool.dtype)
        parts = weights = out
        if self.splits > 1:
            parts = torch.empty(rows, heads, self.splits, head_dim, dtype=torch.float32, device=query.device)
            weights = torch.empty(rows, heads, self.splits, dtype=torch.float32, device=query.device)
        decode_kernel[(rows, kv_heads, self.splits)](
            out=parts,
            weights=weights,
            query=query,
            pool=pool,
            tables=self.tables,
            lengths=self.lengths,
            layer=layer,
            query_stride=query.stride(0),
            table_stride=self.tables.stride(0),
            block_stride=pool.stride(0),
            layer_stride=pool.stride(1),
            scale=head_dim**-0.5 * _LOG2_E,
            **launch.keywords,
        )
        if self.splits > 1:
            join = join_launch(head_dim, self.splits)
            join_kernel[(rows * heads,)](out=out, parts=parts, weights=weights, **join.keywords)
        return out


def paged_rows(pool: Tensor, tables: Tensor, lengths: Tensor, window: int) -> PagedRows:
    max_tokens = tables.shape[1] * pool.shape[4]
    if window:
        max_tokens = min(max_tokens, window)
    num_programs = max(1, tables.shape[0] * pool.shape[3])
    return PagedRows(tables, lengths, window, num_splits(num_programs, max_tokens, _num_processors(pool)))


def _num_processors(pool: Tensor) -> int:
    """1 where there is no device: Triton's interpreter runs one program at a time."""
    return torch.cuda.get_device_properties(pool.device).multi_processor_count if pool.is_cuda else 1

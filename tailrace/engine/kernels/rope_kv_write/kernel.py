"""One program for a few heads of one token: each element of the projection is read once and written where it goes."""

import triton
import triton.language as tl
from torch import Tensor

from tailrace.engine.kernels.launch import Launch, power_of_2
from tailrace.engine.kernels.rope_kv_write.naive import HeadNorms

_HEADS_A_PROGRAM = 4


@triton.jit
def _normed(
    first,  # [NUM, WIDTH] float32
    second,  # [NUM, WIDTH] float32
    is_query,  # [NUM, 1]
    query_norm,  # [head_dim]
    key_norm,  # [head_dim]
    column,  # [1, WIDTH]
    eps,
    HEAD_DIM: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Both halves of heads over their root mean square, rounded where the spec rounds."""
    half: tl.constexpr = HEAD_DIM // 2
    inverse = tl.rsqrt(tl.sum(first * first + second * second, axis=1) / HEAD_DIM + eps)[:, None]
    query_first = tl.load(query_norm + column, mask=column < half, other=0.0).to(tl.float32)
    query_second = tl.load(query_norm + half + column, mask=column < half, other=0.0).to(tl.float32)
    key_first = tl.load(key_norm + column, mask=column < half, other=0.0).to(tl.float32)
    key_second = tl.load(key_norm + half + column, mask=column < half, other=0.0).to(tl.float32)
    first = (first * inverse).to(DTYPE).to(tl.float32) * tl.where(is_query, query_first, key_first)
    second = (second * inverse).to(DTYPE).to(tl.float32) * tl.where(is_query, query_second, key_second)
    return first.to(DTYPE).to(tl.float32), second.to(DTYPE).to(tl.float32)


@triton.jit(do_not_specialize=["layer"])
def rope_kv_write_kernel(
    qkv,  # [tokens, heads + 2 * kv_heads, head_dim], heads contiguous
    cos,  # [tokens, 1, head_dim] float32
    sin,  # [tokens, 1, head_dim] float32
    pool,  # [num_blocks, layers, 2, kv_heads, block, head_dim]
    rows,  # [tokens, 2 * kv_heads] int64; negative: not written
    query_norm,  # [head_dim]; any pointer where HAS_NORMS is false
    key_norm,  # [head_dim]; likewise
    layer,
    qkv_stride,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    NUM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # grid: (tokens, (heads + 2 * kv_heads) / NUM)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * NUM + tl.arange(0, NUM)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    half: tl.constexpr = HEAD_DIM // 2
    mask = (head < HEADS + 2 * KV_HEADS) & (column < half)
    place = qkv + token * qkv_stride + head * HEAD_DIM + column
    first = tl.load(place, mask=mask, other=0.0)
    second = tl.load(place + half, mask=mask, other=0.0)
    dtype = first.dtype

    is_turned = head < HEADS + KV_HEADS
    wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    if HAS_NORMS:
        wide_first, wide_second = _normed(
            wide_first, wide_second, head < HEADS, query_norm, key_norm, column, eps, HEAD_DIM, dtype
        )
    angle = token * HEAD_DIM + column
    cosine = tl.load(cos + angle, mask=column < half, other=0.0)
    sine = tl.load(sin + half + angle, mask=column < half, other=0.0)
    turned_first = (wide_first * cosine - wide_second * sine).to(dtype)
    turned_second = (wide_second * cosine + wide_first * sine).to(dtype)
    tl.store(place, turned_first, mask=mask & is_turned)
    tl.store(place + half, turned_second, mask=mask & is_turned)

    is_key_or_value = (head >= HEADS) & (head < HEADS + 2 * KV_HEADS)
    row = tl.load(rows + token * (2 * KV_HEADS) + head - HEADS, mask=is_key_or_value, other=-1)
    is_cached = mask & (row >= 0)
    target = pool + (row + layer.to(tl.int64) * (2 * KV_HEADS * BLOCK)) * HEAD_DIM + column
    tl.store(target, tl.where(is_turned, turned_first, first), mask=is_cached)
    tl.store(target + half, tl.where(is_turned, turned_second, second), mask=is_cached)


def rope_kv_write_launch(heads: int, kv_heads: int, head_dim: int, block: int, *, has_norms: bool) -> Launch:
    return Launch(
        {
            "HEADS": heads,
            "KV_HEADS": kv_heads,
            "HEAD_DIM": head_dim,
            "BLOCK": block,
            "HAS_NORMS": has_norms,
            "NUM": _HEADS_A_PROGRAM,
            "WIDTH": power_of_2(head_dim // 2),
        },
        num_warps=2 if head_dim > 128 else 1,
    )


def rope_kv_write(
    qkv: Tensor, cos: Tensor, sin: Tensor, pool: Tensor, layer: int, rows: Tensor, norms: HeadNorms | None
) -> None:
    """As naive.rope_kv_write."""
    tokens, all_heads, head_dim = qkv.shape
    _, _, _, kv_heads, block, _ = pool.shape
    assert qkv.stride()[1:] == (head_dim, 1)
    assert all(tensor.is_contiguous() for tensor in (cos, sin, rows, pool))
    launch = rope_kv_write_launch(all_heads - 2 * kv_heads, kv_heads, head_dim, block, has_norms=norms is not None)
    if tokens:
        rope_kv_write_kernel[(tokens, triton.cdiv(all_heads, _HEADS_A_PROGRAM))](
            qkv=qkv,
            cos=cos,
            sin=sin,
            pool=pool,
            rows=rows,
            query_norm=qkv if norms is None else norms.query,
            key_norm=qkv if norms is None else norms.key,
            layer=layer,
            qkv_stride=qkv.stride(0),
            eps=0.0 if norms is None else norms.eps,
            **launch.keywords,
        )

"""One program a row: the residual sum, its mean square and the scaled row in one pass over memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tailrace.engine.kernels.launch import Launch, power_of_2

_ELEMENTS_A_WARP = 512
_MAX_WARPS = 16


@triton.jit
def rms_norm_kernel(
    out,  # [rows, size] of the weight's dtype
    x,  # [rows, size], changed in place where there is a delta
    delta,  # [rows, size]; any pointer where HAS_DELTA is false
    weight,  # [size]
    x_stride,
    delta_stride,
    eps,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_DELTA: tl.constexpr,
):
    # grid: (rows,)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    mask = column < SIZE
    wide = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_DELTA:
        wide += tl.load(delta + row * delta_stride + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(x + row * x_stride + column, wide, mask=mask)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=0) / SIZE + eps)
    scale = tl.load(weight + column, mask=mask, other=0.0)
    # Rounded before the weight is applied, as in the spec.
    normed = (wide * inverse).to(scale.dtype).to(tl.float32) * scale.to(tl.float32)
    tl.store(out + row * SIZE + column, normed.to(scale.dtype), mask=mask)


def rms_norm_launch(size: int, *, has_delta: bool) -> Launch:
    width = power_of_2(size)
    num_warps = min(_MAX_WARPS, max(1, width // _ELEMENTS_A_WARP))
    return Launch({"SIZE": size, "WIDTH": width, "HAS_DELTA": has_delta}, num_warps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As naive.rms_norm."""
    rows = x.reshape(-1, x.shape[-1])
    return _run(rows, None, weight, eps).view(x.shape)


def add_rms_norm(hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As naive.add_rms_norm."""
    return _run(hidden, delta, weight, eps)


def _run(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    num_rows, size = x.shape
    assert x.stride(1) == 1
    assert delta is None or delta.stride(1) == 1
    out = torch.empty(num_rows, size, dtype=weight.dtype, device=x.device)
    if num_rows:
        rms_norm_kernel[(num_rows,)](
            out=out,
            x=x,
            delta=x if delta is None else delta,
            weight=weight,
            x_stride=x.stride(0),
            delta_stride=0 if delta is None else delta.stride(0),
            eps=eps,
            **rms_norm_launch(size, has_delta=delta is not None).keywords,
        )
    return out

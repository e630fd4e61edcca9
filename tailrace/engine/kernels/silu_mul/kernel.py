"""One program for a stretch of one row: gate and value are read once, the product is written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tailrace.engine.kernels.launch import Launch, power_of_2

_MAX_WIDTH = 1024


@triton.jit
def silu_mul_kernel(
    out,  # [tokens, size]
    gate_up,  # [tokens, 2 * size]
    gate_up_stride,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # grid: (tokens, size / WIDTH)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = column < SIZE
    row = gate_up + token * gate_up_stride
    gate = tl.load(row + column, mask=mask, other=0.0)
    up = tl.load(row + SIZE + column, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    # Rounded before the product, as in the spec.
    activated = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(out + token * SIZE + column, (activated * up.to(tl.float32)).to(gate.dtype), mask=mask)


def silu_mul_launch(size: int) -> Launch:
    width = min(_MAX_WIDTH, power_of_2(size))
    return Launch({"SIZE": size, "WIDTH": width}, num_warps=4)


def silu_mul(gate_up: Tensor) -> Tensor:
    """As naive.silu_mul."""
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.stride(1) == 1
    out = torch.empty(tokens, size, dtype=gate_up.dtype, device=gate_up.device)
    launch = silu_mul_launch(size)
    if tokens:
        silu_mul_kernel[(tokens, triton.cdiv(size, launch.constants["WIDTH"]))](
            out=out, gate_up=gate_up, gate_up_stride=gate_up.stride(0), **launch.keywords
        )
    return out

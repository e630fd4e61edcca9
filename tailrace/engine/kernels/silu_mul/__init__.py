"""The gate of a SwiGLU feed-forward layer."""

from torch import Tensor

from tailrace.engine.kernels import backend
from tailrace.engine.kernels.silu_mul import naive

__all__ = ["silu_mul"]


def silu_mul(gate_up: Tensor) -> Tensor:
    """As naive.silu_mul."""
    if backend.runs_triton(gate_up):
        from tailrace.engine.kernels.silu_mul import kernel

        return kernel.silu_mul(gate_up)
    return naive.silu_mul(gate_up)

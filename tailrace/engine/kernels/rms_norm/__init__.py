"""Root-mean-square normalization over the last dimension, alone or after a residual sum."""

from torch import Tensor

from tailrace.engine.kernels import backend
from tailrace.engine.kernels.rms_norm import naive

__all__ = ["add_rms_norm", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As naive.rms_norm."""
    if backend.runs_triton(x):
        from tailrace.engine.kernels.rms_norm import kernel

        return kernel.rms_norm(x, weight, eps)
    return naive.rms_norm(x, weight, eps)


def add_rms_norm(hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As naive.add_rms_norm."""
    if backend.runs_triton(hidden):
        from tailrace.engine.kernels.rms_norm import kernel

        return kernel.add_rms_norm(hidden, delta, weight, eps)
    return naive.add_rms_norm(hidden, delta, weight, eps)

"""Which implementation a launcher picks."""

from torch import Tensor


def runs_triton(tensor: Tensor) -> bool:
    """On CUDA devices the ops are Triton kernels, in `kernel.py` of each op's folder. Triton is imported there only."""
    return tensor.is_cuda

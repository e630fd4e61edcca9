"""All that happens to a layer's queries, keys and values between their projection and attention."""

from torch import Tensor

from tailrace.engine.kernels import backend
from tailrace.engine.kernels.rope_kv_write import naive
from tailrace.engine.kernels.rope_kv_write.naive import HeadNorms

__all__ = ["HeadNorms", "rope_kv_write"]


def rope_kv_write(
    qkv: Tensor, cos: Tensor, sin: Tensor, pool: Tensor, layer: int, rows: Tensor, norms: HeadNorms | None
) -> None:
    """As naive.rope_kv_write."""
    if backend.runs_triton(qkv):
        from tailrace.engine.kernels.rope_kv_write import kernel

        return kernel.rope_kv_write(qkv, cos, sin, pool, layer, rows, norms)
    return naive.rope_kv_write(qkv, cos, sin, pool, layer, rows, norms)

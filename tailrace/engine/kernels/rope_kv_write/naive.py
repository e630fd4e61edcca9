"""The spec, and what runs on a CPU: the norms of heads, rotation, and the write, one after the other."""

from dataclasses import dataclass

from torch import Tensor

from tailrace.engine.kernels.kv_write import kv_write
from tailrace.engine.kernels.rms_norm.naive import rms_norm
from tailrace.engine.kernels.rope import rope_


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMS norms over head_dim, as Qwen3 has them."""

    query: Tensor
    """[head_dim]"""
    key: Tensor
    """[head_dim]"""
    eps: float


def rope_kv_write(
    qkv: Tensor,  # [tokens, heads + 2 * kv_heads, head_dim]; query and key heads are changed in place
    cos: Tensor,  # [tokens, 1, head_dim] float32, both halves alike
    sin: Tensor,  # [tokens, 1, head_dim] float32, the first half negated
    pool: Tensor,  # [num_blocks, layers, 2, kv_heads, block, head_dim], changed in place
    layer: int,
    rows: Tensor,  # [tokens, 2 * kv_heads] int64, as kernels.kv_write.kv_write takes them
    norms: HeadNorms | None,
) -> None:
    """Normalizes (where there are norms) and turns queries and keys; keys and values go to the pool as well."""
    kv_heads = pool.shape[3]
    if norms is not None:
        queries, keys = qkv[:, : -2 * kv_heads], qkv[:, -2 * kv_heads : -kv_heads]
        queries.copy_(rms_norm(queries, norms.query, norms.eps))
        keys.copy_(rms_norm(keys, norms.key, norms.eps))
    rope_(qkv[:, :-kv_heads], cos, sin)
    kv_write(pool, layer, rows, qkv[:, -2 * kv_heads :])

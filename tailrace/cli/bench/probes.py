"""The two limits of this machine that an engine is held against: streaming weights, and multiplying matrices."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

STREAM_BYTES = 512 << 20
"""Far more than any cache."""
_GEMM_SIZES = (512, 1024, 2048)
_REPEATS = 10


@dataclass(frozen=True, slots=True)
class MachineLimits:
    stream_bytes_per_s: float
    gemm_flops_per_s: float
    """In bfloat16, whatever the model's dtype: the fastest that this machine multiplies."""

    def or_better(self, other: "MachineLimits") -> "MachineLimits":
        """Whatever else runs can only slow a probe down, so the faster of two is nearer to the truth."""
        return MachineLimits(
            max(self.stream_bytes_per_s, other.stream_bytes_per_s), max(self.gemm_flops_per_s, other.gemm_flops_per_s)
        )


def measure_limits(*, num_bytes: int = STREAM_BYTES) -> MachineLimits:
    """In this process, with the threads that torch has now."""
    with torch.inference_mode():
        return MachineLimits(_stream_bytes_per_s(num_bytes), max(map(_gemm_flops_per_s, _GEMM_SIZES)))


def _stream_bytes_per_s(num_bytes: int) -> float:
    """Reading only, as weights are read. Of two reductions the faster: neither should be bound by arithmetic."""
    words = torch.ones(num_bytes // 8, dtype=torch.int64)
    floats = torch.ones(num_bytes // 4, dtype=torch.float32)
    return num_bytes / min(_best_s(words.sum), _best_s(floats.sum))


def _gemm_flops_per_s(size: int) -> float:
    a, b = (torch.ones(size, size, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / _best_s(lambda: a @ b)


def _best_s(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)

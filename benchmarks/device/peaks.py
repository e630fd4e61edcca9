"""What a device can do at most, as measured on it, and rows of figures held against that."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.limits import Limits

DTYPE = torch.bfloat16
BLOCK = 16

Timer = Callable[[Callable[[], object]], float]
"""Median seconds of one call."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A model, as far as time depends on it."""

    name: str
    architecture: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    @property
    def has_head_norms(self) -> bool:
        return self.architecture.startswith("Qwen3")

    def config(self, context: int) -> dict[str, object]:
        return {
            "architectures": [self.architecture],
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": self.tied,
            "eos_token_id": 2,
        }


MODELS = (
    Shape("Llama-3.1-8B", "LlamaForCausalLM", 32, 4096, 14336, 32, 8, 128, 128256, False),
    Shape("Qwen3-0.6B", "Qwen3ForCausalLM", 28, 1024, 3072, 16, 8, 128, 151936, True),
)


@dataclass(frozen=True, slots=True)
class Peaks:
    """Of the device, as measured."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: what it moved or computed in which time."""

    name: str
    seconds: float
    num_bytes: float = 0.0
    flops: float = 0.0
    asked: Limits | None = None
    """Of the share of the peak."""

    def text(self, peaks: Peaks) -> str:
        rate, share = f"{self.num_bytes / self.seconds / 1e9:8.0f} GB/s", self.num_bytes / peaks.bytes_per_s
        if self.flops:
            rate, share = f"{self.flops / self.seconds / 1e12:8.0f} TFLOP/s", self.flops / peaks.flops_per_s
        share /= self.seconds
        kind = "MFU" if self.flops else "MBU"
        line = f"{self.name:<52} {self.seconds * 1e6:12.1f} us {rate:>17} {kind} {share:6.1%}"
        return line + (self.asked.beside(share) if self.asked else "")


def cuda_timer(call: Callable[[], object], *, repeats: int = 30) -> float:
    """Median of `repeats` calls by CUDA events, each after the cache was overwritten; compiled and warm before."""
    eviction = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        eviction.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def measure_peaks(timer: Timer, device: str, *, copy_bytes: int = 1 << 30, size: int = 8192) -> Peaks:
    source = torch.zeros(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * copy_bytes / timer(lambda: target.copy_(source))
    left, right = (torch.randn(size, size, device=device).to(DTYPE) for _ in range(2))
    return Peaks(bandwidth, 2 * size**3 / timer(lambda: left @ right))

"""Hardware profiles: how long prefills, decode steps and transfers take, by formulas.

Peaks and bandwidths are the vendors' (NVIDIA's data sheets: dense bfloat16, HBM). The shares of them that are reached,
the fixed times and the sizes of host memory and NVMe are assumed, and marked so; pass others to see what they change.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class HardwareProfile:
    name: str
    # The model.
    num_parameters: float
    num_layers: int
    hidden_size: int
    kv_bytes_per_token: int
    weight_bytes: float
    # The device.
    flops_per_s: float
    """Of prefill, as reached: the peak times the share assumed."""
    memory_bytes_per_s: float
    """Of decode, as reached."""
    link_bytes_per_s: float
    """Between two workers, one direction."""
    host_bytes_per_s: float
    """Between a worker and its node's CPU tier."""
    nvme_bytes_per_s: float
    step_overhead_s: float
    """Of any step, beside its arithmetic and its reads."""
    host_memory_bytes: float
    """Of the CPU tier, a worker."""
    nvme_bytes: float
    chunk_tokens: int
    """Most tokens of a prefill step; what the transfer of the last one takes is not hidden."""
    attention_flops_per_s: float = 0.0
    """Of prefill, as reached where it reads the KV before it; 0: as `flops_per_s`."""
    prefill_overhead_s: float = 0.0
    """Of a prefill step beyond `step_overhead_s`."""
    context_s_per_token: float = 0.0
    """What a token of KV before a chunk adds to it, whatever the chunk's length."""
    request_overhead_s: float = 0.0
    """What a request spends before its first token in the gateway and between processes, the worker being free."""
    fetch_overhead_s: float = 0.0
    """Of a fetch beside its bytes, the holder being idle: asking for the loan, the first read, telling both engines."""
    step_per_row_s: float = 0.0
    """What a sequence adds to a decode step beside its context."""
    handoff_overhead_s: float = 0.0
    """From a prompt's last step to the batch of its decode worker, beside the bytes that are not hidden."""
    contention: float = 0.0
    """Of workers that share a machine: how much longer a step takes while all others prefill, as a share of it."""
    cores: int = 0
    """That all workers share, each computing on one at a time; 0: each has its own."""
    max_num_seqs: int = 64
    """Of a prefill worker."""

    def compute_s(self, start: int, end: int) -> float:
        """A chunk, tokens start to end of a prompt: 2 P S + 2 layers hidden S^2 floating point operations, less those
        of the first `start` tokens, and reading the KV of these."""
        linear = 2.0 * self.num_parameters * (end - start)
        square = 2.0 * self.num_layers * self.hidden_size * (end**2 - start**2)
        attention_s = square / (self.attention_flops_per_s or self.flops_per_s)
        return linear / self.flops_per_s + attention_s + self.context_s_per_token * start

    def step_s(self, chunks: Iterable[tuple[int, int]]) -> float:
        """One step over chunks of prompts, (start, end) each."""
        fixed_s = self.step_overhead_s + self.prefill_overhead_s
        return fixed_s + sum(self.compute_s(start, end) for start, end in chunks)

    def prefill_s(self, cached_tokens: int, prompt_tokens: int) -> float:
        """A prompt alone, in as many steps as it needs."""
        more = (prompt_tokens - cached_tokens - 1) // self.chunk_tokens
        begun_before = more * cached_tokens + self.chunk_tokens * more * (more + 1) // 2
        fixed_s = self.step_overhead_s + self.prefill_overhead_s
        compute_s = self.compute_s(cached_tokens, prompt_tokens)
        return (more + 1) * fixed_s + compute_s + self.context_s_per_token * begun_before

    @property
    def step_base_s(self) -> float:
        """A decode step of an empty batch: all weights are read once."""
        return self.step_overhead_s + self.weight_bytes / self.memory_bytes_per_s

    @property
    def step_per_token_s(self) -> float:
        """What one token of context adds to a decode step: its KV is read."""
        return self.kv_bytes_per_token / self.memory_bytes_per_s

    def exposed_transfer_s(self, prompt_tokens: int) -> float:
        """The last chunk's bytes over the link, and what a hand-off takes beside them: what came before moved while
        prefill computed."""
        num_bytes = min(prompt_tokens, self.chunk_tokens) * self.kv_bytes_per_token
        return self.handoff_overhead_s + num_bytes / self.link_bytes_per_s

    def slowed(self, factor: float) -> "HardwareProfile":
        """Prefills that take `factor` times as long."""
        return replace(
            self,
            flops_per_s=self.flops_per_s / factor,
            attention_flops_per_s=self.attention_flops_per_s / factor,
            step_overhead_s=self.step_overhead_s * factor,
            prefill_overhead_s=self.prefill_overhead_s * factor,
            context_s_per_token=self.context_s_per_token * factor,
        )

    def with_link(self, gbit_per_s: float) -> "HardwareProfile":
        return replace(self, link_bytes_per_s=gbit_per_s * 1e9 / 8)


_H100 = HardwareProfile(
    name="h100",
    num_parameters=8.03e9,
    num_layers=32,
    hidden_size=4096,
    kv_bytes_per_token=131_072,
    weight_bytes=16.06e9,
    flops_per_s=0.5 * 989e12,
    memory_bytes_per_s=0.8 * 3.35e12,
    link_bytes_per_s=400e9 / 8,
    host_bytes_per_s=50e9,
    nvme_bytes_per_s=6e9,
    step_overhead_s=0.001,
    host_memory_bytes=256e9,
    nvme_bytes=2e12,
    chunk_tokens=2048,
    fetch_overhead_s=0.01,
)
"""Llama-3.1-8B in bfloat16. Assumed: half of the peak in prefill, 0.8 of the HBM bandwidth in decode, 1 ms a step, 50
of PCIe 5's 64 GB/s, one NVMe disk of 6 GB/s and 2 TB, 256 GB of host memory a GPU, steps of at most
2,048 tokens: with 512, 1,024 or 8,192 the mean TTFT is within 2 % on the page of measurements. A fetch is given 10 ms
beside its bytes, which are the work of two hosts, and what two processes on a CPU were measured to take."""

_CPU = HardwareProfile(
    name="cpu",
    num_parameters=134.5e6,
    num_layers=30,
    hidden_size=576,
    kv_bytes_per_token=23_040,
    weight_bytes=269e6,
    flops_per_s=0.544e12,
    memory_bytes_per_s=35.5e9,
    link_bytes_per_s=9.2e9,
    host_bytes_per_s=9.2e9,
    nvme_bytes_per_s=1e9,
    step_overhead_s=0.0005,
    host_memory_bytes=4e9,
    nvme_bytes=16e9,
    chunk_tokens=512,
    attention_flops_per_s=0.372e12,
    prefill_overhead_s=0.003,
    context_s_per_token=4.37e-6,
    request_overhead_s=0.007,
    fetch_overhead_s=0.011,
)
"""SmolLM2-135M in bfloat16 on one core of the benchmarks' machine: prefill and what a fetch takes beside its bytes as
`tailrace bench simulator` measures them, the decode step at batch 1 and the hand-off over nixl from the pages of
2026-11-21. The store's rates and sizes are assumed."""

PROFILES = {
    "h100": _H100,
    # The same arithmetic, more and faster memory.
    "h200": replace(_H100, name="h200", memory_bytes_per_s=0.8 * 4.8e12),
    "cpu": _CPU,
}

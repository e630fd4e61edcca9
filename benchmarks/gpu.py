"""Kernels and whole models on one CUDA device: checked first, then measured against what the device itself can do.

    python benchmarks/gpu.py [--only checks kernels models]

Weights are random, written nowhere; the 8B model's take minutes to draw. Shares are of two limits measured in the same
run: the bandwidth of a device-to-device copy (bytes read and written), and the rate of a large bfloat16 matrix product.
Exit status: 0, 1 when a kernel differs from its spec, 2 when there is no CUDA device.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from tailrace.checkpoint.model_config import load_model_config
from tailrace.engine.engine import Engine, EngineOptions, load_engine
from tailrace.engine.kernels import attention_decode, attention_prefill, kv_write, rms_norm, rope_kv_write, silu_mul
from tailrace.engine.kernels.attention_decode import naive as decode_spec
from tailrace.engine.kernels.attention_prefill import naive as prefill_spec
from tailrace.engine.kernels.rms_norm import naive as norm_spec
from tailrace.engine.kernels.rope_kv_write import naive as rope_spec
from tailrace.engine.kernels.silu_mul import naive as silu_spec
from tailrace.engine.models.loading import tensor_shapes
from tailrace.plan import Chunk, SequenceStart, StepPlan
from tailrace.types import SamplingParams

DTYPE = torch.bfloat16
TOLERANCE = 2e-2
BLOCK = 16
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
SECTIONS = ("checks", "kernels", "models")

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
class Limits:
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

    def text(self, limits: Limits) -> str:
        rate, share = f"{self.num_bytes / self.seconds / 1e9:8.0f} GB/s", self.num_bytes / limits.bytes_per_s
        if self.flops:
            rate, share = f"{self.flops / self.seconds / 1e12:8.0f} TFLOP/s", self.flops / limits.flops_per_s
        kind = "MFU" if self.flops else "MBU"
        return f"{self.name:<52} {self.seconds * 1e6:12.1f} us {rate:>17} {kind} {share / self.seconds:6.1%}"


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


def measure_limits(timer: Timer, device: str, *, copy_bytes: int = 1 << 30, size: int = 8192) -> Limits:
    source = torch.zeros(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * copy_bytes / timer(lambda: target.copy_(source))
    left, right = (torch.randn(size, size, device=device).to(DTYPE) for _ in range(2))
    return Limits(bandwidth, 2 * size**3 / timer(lambda: left @ right))


@dataclass(frozen=True, slots=True)
class Paged:
    """A pool of two layers in which rows of one length have their blocks, and queries, keys and values for them."""

    pool: Tensor
    tables: Tensor
    lengths: Tensor

    @classmethod
    def make(cls, shape: Shape, rows: int, length: int, device: str) -> "Paged":
        blocks = -(-length // BLOCK)
        order = torch.randperm(rows * blocks, device=device).int().view(rows, blocks)
        pool = torch.randn(rows * blocks, 2, 2, shape.kv_heads, BLOCK, shape.head_dim, dtype=DTYPE, device=device)
        return cls(pool, order, torch.full((rows,), length, device=device))


def queries(shape: Shape, tokens: int, device: str) -> Tensor:
    """[tokens, heads + 2 * kv_heads, head_dim]"""
    return torch.randn(tokens, shape.heads + 2 * shape.kv_heads, shape.head_dim, dtype=DTYPE, device=device)


@dataclass(frozen=True, slots=True)
class Rotation:
    """The arguments of rope_kv_write."""

    qkv: Tensor
    cos: Tensor
    sin: Tensor
    pool: Tensor
    rows: Tensor
    norms: rope_kv_write.HeadNorms | None

    @classmethod
    def make(cls, shape: Shape, tokens: int, device: str) -> "Rotation":
        pool = Paged.make(shape, 1, tokens, device).pool
        at = torch.arange(tokens, device=device)
        angles = torch.randn(tokens, 1, shape.head_dim // 2, device=device)
        cos, sin = torch.cat((angles.cos(),) * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1)
        weight = torch.rand(shape.head_dim, device=device).to(DTYPE)
        norms = rope_kv_write.HeadNorms(weight, weight, 1e-5) if shape.has_head_norms else None
        rows = kv_write.write_rows(pool, at // BLOCK, at % BLOCK)
        return cls(queries(shape, tokens, device), cos, sin, pool, rows, norms)


def checks(shape: Shape, device: str, *, rows: int = 5, length: int = 700) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(what, computed by the launcher, computed by the spec) of every op."""
    paged, own = Paged.make(shape, rows, length, device), queries(shape, rows, device)[:, : shape.heads]
    for window in (0, length // 3):
        prepared = attention_decode.decode_rows(paged.pool, paged.tables, paged.lengths, [length] * rows, window)
        expected = decode_spec.attention_decode(own, paged.pool, 1, paged.tables, paged.lengths, window)
        yield (
            f"attention_decode, window {window}",
            attention_decode.attention_decode(own, paged.pool, 1, prepared),
            expected,
        )
        start = length // 4
        new = queries(shape, length - start, device)
        span = attention_prefill.chunk_span(paged.pool, paged.tables[0], start, length, window)
        found = attention_prefill.attention_prefill(new[:, : shape.heads], new, paged.pool, 1, span)
        expected = prefill_spec.attention_prefill(new[:, : shape.heads], paged.pool, 1, paged.tables[0], start, window)
        yield f"attention_prefill, window {window}", found, expected
    hidden, delta = torch.randn(rows, shape.hidden, device=device), torch.randn(rows, shape.hidden, device=device)
    delta, weight = delta.to(DTYPE), torch.rand(shape.hidden, device=device).to(DTYPE)
    expected = norm_spec.add_rms_norm(hidden.clone(), delta, weight, 1e-5)
    yield "add_rms_norm", rms_norm.add_rms_norm(hidden, delta, weight, 1e-5), expected
    gate_up = torch.randn(rows, 2 * shape.inner, dtype=DTYPE, device=device)
    yield "silu_mul", silu_mul.silu_mul(gate_up), silu_spec.silu_mul(gate_up)
    rotation = Rotation.make(shape, rows, device)
    qkv, pool = rotation.qkv.clone(), rotation.pool.clone()
    rope_spec.rope_kv_write(qkv, rotation.cos, rotation.sin, pool, 1, rotation.rows, rotation.norms)
    rotate(rotation)
    yield "rope_kv_write, heads", rotation.qkv, qkv
    yield "rope_kv_write, pool", rotation.pool, pool


def rotate(rotation: Rotation) -> None:
    rope_kv_write.rope_kv_write(
        rotation.qkv, rotation.cos, rotation.sin, rotation.pool, 1, rotation.rows, rotation.norms
    )


def check_all(shape: Shape, device: str, **sizes: int) -> bool:
    """Prints a line for each op; true when all agree."""
    all_agree = True
    for name, found, expected in checks(shape, device, **sizes):
        error = (found.float() - expected.float()).abs() / (1 + expected.float().abs())
        worst = float(error.max())
        agrees = worst <= TOLERANCE  # false for NaN
        print(f"{'ok' if agrees else 'DIFFERS':<8} {shape.name:<14} {name:<32} largest error {worst:.2e}")
        all_agree &= agrees
    return all_agree


def kernel_rows(shape: Shape, timer: Timer, device: str, *, contexts: tuple[tuple[int, int], ...]) -> Iterator[Row]:
    """contexts: (rows, tokens each)."""
    for rows, length in contexts:
        yield decode_row(shape, timer, device, rows, length)
    tokens = max(length for _, length in contexts)
    yield prefill_row(shape, timer, device, tokens)
    for count in (contexts[0][0], tokens):
        hidden, weight = torch.randn(count, shape.hidden, device=device), torch.ones(shape.hidden, device=device)
        delta, weight = hidden.to(DTYPE), weight.to(DTYPE)
        seconds = timer(partial(rms_norm.add_rms_norm, hidden, delta, weight, 1e-5))
        yield Row(f"{shape.name} add_rms_norm {count}", seconds, 2 * hidden.nbytes + 2 * delta.nbytes)
        gate_up = torch.randn(count, 2 * shape.inner, dtype=DTYPE, device=device)
        seconds = timer(partial(silu_mul.silu_mul, gate_up))
        yield Row(f"{shape.name} silu_mul {count}", seconds, 1.5 * gate_up.nbytes)
        rotation = Rotation.make(shape, count, device)
        seconds = timer(partial(rotate, rotation))
        cached = 2 * shape.kv_heads / rotation.qkv.shape[1]
        moved = (2 + cached) * rotation.qkv.nbytes + rotation.cos.nbytes + rotation.rows.nbytes
        yield Row(f"{shape.name} rope_kv_write {count}", seconds, moved)


def decode_row(shape: Shape, timer: Timer, device: str, rows: int, length: int) -> Row:
    paged, own = Paged.make(shape, rows, length, device), queries(shape, rows, device)[:, : shape.heads]
    prepared = attention_decode.decode_rows(paged.pool, paged.tables, paged.lengths, [length] * rows, 0)
    seconds = timer(lambda: attention_decode.attention_decode(own, paged.pool, 1, prepared))
    moved = rows * length * 2 * shape.kv_heads * shape.head_dim * DTYPE.itemsize
    return Row(f"{shape.name} attention_decode {rows} x {length}", seconds, moved)


def prefill_row(shape: Shape, timer: Timer, device: str, tokens: int) -> Row:
    paged, new = Paged.make(shape, 1, tokens, device), queries(shape, tokens, device)
    span = attention_prefill.chunk_span(paged.pool, paged.tables[0], 0, tokens, 0)
    own = new[:, : shape.heads]
    seconds = timer(lambda: attention_prefill.attention_prefill(own, new[:, shape.heads :], paged.pool, 1, span))
    return Row(f"{shape.name} attention_prefill {tokens}", seconds, flops=_attention_flops(shape, tokens))


def _attention_flops(shape: Shape, tokens: int) -> float:
    """Two products over the half of the square that a causal mask leaves."""
    return 2.0 * shape.heads * shape.head_dim * tokens**2


def model_rows(shape: Shape, device: str, *, batch: int, context: int, prompt: int, steps: int = 32) -> Iterator[Row]:
    """Whole steps of the runner, sampling and the copy of the tokens to the host included."""
    longest = max(context + 2 * steps, prompt + 1)  # a prompt is followed by the token drawn
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape.config(longest)))
        engine = load_engine(
            EngineOptions(
                Path(folder),
                dtype="bfloat16",
                num_blocks=max(batch * -(-(context + 2 * steps) // BLOCK), -(-longest // BLOCK)),
                max_num_seqs=batch,
                load_format="dummy",
                device=device,
            )
        )
        shapes = tensor_shapes(load_model_config(Path(folder)))
    weights = sum(map(prod, shapes.values())) - (0 if shape.tied else shape.vocab * shape.hidden)
    linear = weights - shape.vocab * shape.hidden
    seconds = statistics.median(_prefill(engine, prompt) for _ in range(5))
    flops = 2.0 * linear * prompt + shape.layers * _attention_flops(shape, prompt)
    yield Row(f"{shape.name} prefill {prompt}", seconds, flops=flops)
    for size in sorted({1, batch}):
        seconds = statistics.median(_decode(engine, size, context, steps))
        cached = size * (context + steps / 2) * engine.layout.bytes_per_token
        yield Row(f"{shape.name} decode {size} x {context}", seconds, weights * DTYPE.itemsize + cached)


def _start(slot: int, num_tokens: int, longest: int) -> SequenceStart:
    blocks = -(-longest // BLOCK)
    tokens = [(slot + index) % 1000 for index in range(num_tokens)]
    return SequenceStart(slot, tokens, num_tokens, GREEDY, 0, list(range(slot * blocks, (slot + 1) * blocks)))


def _prefill(engine: Engine, prompt: int) -> float:
    plan = StepPlan(released=[0], started=[_start(0, prompt, prompt + 1)], chunks=[Chunk(0, 0, prompt, (0,))])
    return engine.runner.run(plan).elapsed_s


def _decode(engine: Engine, batch: int, context: int, steps: int) -> list[float]:
    slots = list(range(batch))
    for slot in slots:
        started = _start(slot, context, context + 2 * steps)
        engine.runner.run(StepPlan(released=[slot], started=[started], chunks=[Chunk(slot, 0, context, (0,))]))
    return [engine.runner.run(StepPlan(decode=slots)).elapsed_s for _ in range(steps)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION")
    chosen = parser.parse_args(arguments).only
    if not torch.cuda.is_available():
        print("gpu: torch sees no CUDA device here, so nothing was checked or measured", file=sys.stderr)
        return 2
    properties = torch.cuda.get_device_properties(0)
    print(f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}")
    print(f"torch {torch.__version__}, triton {version('triton')}, bfloat16, blocks of {BLOCK} tokens")
    with torch.inference_mode():
        return _run(chosen)


def _run(chosen: list[str]) -> int:
    if "checks" in chosen and not all(check_all(shape, "cuda") for shape in MODELS):
        return 1
    limits = measure_limits(cuda_timer, "cuda")
    print(f"copy {limits.bytes_per_s / 1e9:.0f} GB/s, matrix product {limits.flops_per_s / 1e12:.0f} TFLOP/s")
    for shape in MODELS:
        if "kernels" in chosen:
            for row in kernel_rows(shape, cuda_timer, "cuda", contexts=((64, 1024), (1, 8192), (8, 8192))):
                print(row.text(limits), flush=True)
        if "models" in chosen:
            for row in model_rows(shape, "cuda", batch=64, context=1024, prompt=8192):
                print(row.text(limits), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

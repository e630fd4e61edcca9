"""Each kernel by itself: against its spec, and against the limits of the device."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.device.peaks import BLOCK, DTYPE, Row, Shape, Timer
from benchmarks.limits import Limits
from tailrace.engine.kernels import attention_decode, attention_prefill, kv_write, rms_norm, rope_kv_write, silu_mul
from tailrace.engine.kernels.attention_decode import naive as decode_spec
from tailrace.engine.kernels.attention_prefill import naive as prefill_spec
from tailrace.engine.kernels.rms_norm import naive as norm_spec
from tailrace.engine.kernels.rope_kv_write import naive as rope_spec
from tailrace.engine.kernels.silu_mul import naive as silu_spec
from tailrace.engine.sampler import SamplingState, draw_tokens
from tailrace.types import SamplingParams

TOLERANCE = 2e-2


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


@dataclass(frozen=True, slots=True)
class Drawing:
    """The arguments of draw_tokens, for rows that each have a slot."""

    logits: Tensor
    state: SamplingState
    slots: Tensor
    choices: Tensor
    positions: Tensor
    tokens: Tensor

    @classmethod
    def make(cls, vocab: int, params: Sequence[SamplingParams], device: str) -> "Drawing":
        """The same logits on every device."""
        rows, prompt, drawn = len(params), 24, 8
        generator = torch.Generator().manual_seed(1)
        logits = 3 * torch.randn(rows, vocab, generator=generator)
        tokens = torch.randint(vocab, (rows, prompt + drawn), generator=generator, dtype=torch.int32)
        state = SamplingState(rows, vocab, (2,), device)
        for slot, row in enumerate(params):
            state.set(slot, row, prompt)
        slots = torch.arange(rows, device=device)
        positions = torch.full_like(slots, prompt + drawn)
        return cls(logits.to(device), state, slots, torch.zeros_like(slots), positions, tokens.to(device))

    def draw(self) -> Tensor:
        return draw_tokens(self.logits, self.state, self.slots, self.choices, self.positions, self.tokens)[0]


_NUCLEUS = SamplingParams(temperature=0.8, top_p=0.9, top_k=50, seed=11)
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(temperature=1.0, seed=7),
    "top-k, top-p": _NUCLEUS,
    "penalties": replace(_NUCLEUS, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.3),
}


def sampling_agrees(vocab: int, device: str, *, rows: int = 16) -> bool:
    """Rows of every kind in one step: on the device the tokens are those that the spec draws on the CPU."""
    params = [replace(params, seed=row) for row in range(rows) for params in SAMPLINGS.values()]
    found, expected = (Drawing.make(vocab, params, where).draw().cpu() for where in (device, "cpu"))
    differing = int((found != expected).sum())
    print(
        f"{'ok' if not differing else 'DIFFERS':<8} sampling, {vocab} tokens: {differing} of {len(params)} rows differ"
    )
    return not differing


def sampling_rows(vocab: int, timer: Timer, device: str, *, rows: int = 64) -> Iterator[Row]:
    """Against one pass over the logits, which is the least that drawing from them can take."""
    for name, params in SAMPLINGS.items():
        drawing = Drawing.make(vocab, [replace(params, seed=row) for row in range(rows)], device)
        yield Row(f"sampling {name}, {rows} x {vocab}", timer(drawing.draw), drawing.logits.nbytes)


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
    return Row(f"{shape.name} attention_decode {rows} x {length}", seconds, moved, asked=Limits(0.75, 0.90))


def prefill_row(shape: Shape, timer: Timer, device: str, tokens: int) -> Row:
    paged, new = Paged.make(shape, 1, tokens, device), queries(shape, tokens, device)
    span = attention_prefill.chunk_span(paged.pool, paged.tables[0], 0, tokens, 0)
    own = new[:, : shape.heads]
    seconds = timer(lambda: attention_prefill.attention_prefill(own, new[:, shape.heads :], paged.pool, 1, span))
    return Row(f"{shape.name} attention_prefill {tokens}", seconds, flops=attention_flops(shape, tokens))


def attention_flops(shape: Shape, tokens: int) -> float:
    """Two products over the half of the square that a causal mask leaves."""
    return 2.0 * shape.heads * shape.head_dim * tokens**2

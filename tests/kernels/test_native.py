"""The compiled kernels: a whole decoder against the one of plain torch, over shapes and both kinds of attention."""

import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tailrace.checkpoint.cache_dir import default_cache_dir
from tailrace.checkpoint.model_config import ModelConfig
from tailrace.checkpoint.rope_config import RopeConfig
from tailrace.compiler import NativeUnavailableError
from tailrace.engine.batch import BatchState
from tailrace.engine.models.decoder import Decoder
from tailrace.engine.models.linear import PlainLinear
from tailrace.engine.models.loading import LinearMakers, load_weights, tensor_shapes
from tailrace.engine.models.rotary import rotary_table
from tailrace.engine.native.decoder import NativeDecoder
from tailrace.engine.native.library import load_library, source_for
from tailrace.engine.native.packing import WeightArena
from tailrace.engine.weights import DummySource
from tailrace.plan import Chunk, StepPlan
from tests.helpers.kernels import normal, poisoned_memory
from tests.helpers.reference_models import start

pytestmark = pytest.mark.kernels
CPU = torch.device("cpu")


class Shape(NamedTuple):
    head_dim: int
    group: int
    kv_heads: int
    block: int
    window: int
    dtype: str
    num_threads: int
    has_norm: bool


# Each value of each dimension with most values of the others; the full product runs with `make kernels-full`.
PAIRWISE = [
    Shape(64, 3, 3, 16, 0, "bfloat16", 1, False),
    Shape(64, 1, 2, 32, 20, "float32", 2, True),
    Shape(80, 16, 1, 16, 5, "bfloat16", 2, True),
    Shape(80, 4, 2, 64, 0, "float32", 1, False),
    Shape(96, 2, 2, 32, 0, "bfloat16", 2, False),
    Shape(96, 16, 1, 64, 33, "float32", 1, True),
    Shape(128, 1, 3, 64, 20, "bfloat16", 1, True),
    Shape(128, 8, 1, 16, 0, "float32", 2, False),
    Shape(256, 5, 1, 32, 7, "bfloat16", 1, False),
    Shape(256, 2, 2, 16, 0, "float32", 2, True),
    Shape(8, 7, 1, 4, 0, "bfloat16", 1, False),
    Shape(24, 3, 2, 4, 9, "float32", 1, True),
]
FULL = [
    Shape(*values)
    for values in product(
        (64, 80, 96, 128, 256), (1, 3, 4, 16), (1, 3), (16, 32, 64), (0, 20), ("bfloat16", "float32"), (1, 2), (True,)
    )
]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


def config_of(shape: Shape) -> ModelConfig:
    return ModelConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=131,
        hidden_size=74,
        intermediate_size=90,
        num_layers=2,
        num_heads=shape.group * shape.kv_heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=1e-5,
        rope=RopeConfig(10000.0),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        qk_norm=shape.has_norm,
        window=shape.window,
        windowed_layers=(1,) if shape.window else (),
        bos_token_id=None,
        eos_token_ids=(),
        dtype=shape.dtype,
    )


class Pair:
    """The two decoders with the same weights, each with its own batch and pool."""

    def __init__(self, shape: Shape, lengths: list[int]) -> None:
        config, dtype = config_of(shape), getattr(torch, shape.dtype)
        source, rotary = DummySource(tensor_shapes(config)), rotary_table(config.rope, shape.head_dim, 1024, CPU)
        arena = WeightArena()
        native = load_weights(source, config, LinearMakers(arena.pack, arena.pack_gated), dtype=dtype, device=CPU)
        # The reference computes in float32 with the same, rounded, weights.
        exact = load_weights(
            _Rounded(source, dtype), config, LinearMakers(PlainLinear, PlainLinear), dtype=torch.float32, device=CPU
        )
        library = load_library(shape.dtype, default_cache_dir())
        self.decoders = (
            Decoder(config, exact, rotary),
            NativeDecoder(config, native, rotary, library, shape.num_threads),
        )
        counts = [-(-(length + 8) // shape.block) for length in lengths]
        order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(3)).tolist()
        size = (sum(counts) + 3, config.num_layers, 2, shape.kv_heads, shape.block, shape.head_dim)
        # Plain torch multiplies what it masks, so its pool must be finite.
        self.pools = [torch.zeros(size), torch.full(size, torch.nan, dtype=dtype)]
        self.batch = BatchState(len(lengths), 1024, shape.block, CPU)
        for slot, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            tokens = normal(slot, length).mul(1000).long().remainder(131).tolist()
            self.batch.update([start(slot, tokens, [order.pop() for _ in range(count)])], [])

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> tuple[torch.Tensor, torch.Tensor]:
        expected, actual = (
            decoder.logits(decoder.forward(plan, self.batch, pool))
            for decoder, pool in zip(self.decoders, self.pools, strict=True)
        )
        return actual, expected


class _Rounded:
    def __init__(self, source: DummySource, dtype: torch.dtype) -> None:
        self._source, self._dtype, self.digest = source, dtype, source.digest

    def tensor(self, name: str) -> torch.Tensor:
        return self._source.tensor(name).to(self._dtype)


def check(shape: Shape) -> None:
    """Prefill at once, in chunks, and after a cached prefix; then decode of short and long rows beside a chunk."""
    lengths = [1, 300, 37, 130, 2]
    pair = Pair(shape, lengths)
    plans = [
        StepPlan(chunks=[Chunk(0, 0, 1), Chunk(1, 0, 299), Chunk(2, 0, 36)]),
        StepPlan(chunks=[Chunk(3, 0, 129), Chunk(4, 0, 1)]),
        StepPlan(decode=[3, 1, 2]),
        StepPlan(decode=[1]),
        StepPlan(decode=[4, 2], chunks=[Chunk(3, 70, 129), Chunk(1, 299, 300)]),
        StepPlan(decode=[0]),
    ]
    for plan in plans:
        actual, expected = pair.run(plan)
        assert actual.shape == (plan.num_tokens, 131)
        if shape.dtype == "float32":
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        else:
            assert torch.cosine_similarity(actual, expected, dim=-1).min() > 0.9995
    exact, native = pair.pools
    assert torch.equal(exact != 0, ~native.isnan())  # nothing else was written, and nothing was left out


@pytest.mark.parametrize("shape", PAIRWISE, ids=str)
def test_equals_plain_torch(shape: Shape) -> None:
    check(shape)


@pytest.mark.kernels_full
@pytest.mark.parametrize("shape", FULL, ids=str)
def test_equals_plain_torch_in_full(shape: Shape) -> None:
    check(shape)


def test_what_does_not_exist_is_refused_and_changes_nothing() -> None:
    pair = Pair(PAIRWISE[0], [20])
    native, pool = pair.decoders[1], pair.pools[1]
    for plan in (
        StepPlan(decode=[1]),
        StepPlan(decode=[-1]),
        StepPlan(chunks=[Chunk(0, 0, 1025)]),
        StepPlan(chunks=[Chunk(2, 0, 5)]),
    ):
        with pytest.raises(ValueError, match="does not exist"):
            native.forward(plan, pair.batch, pool)
    pair.batch.tables[0, 1] = pool.shape[0]
    with pytest.raises(ValueError, match="does not exist"):
        native.forward(StepPlan(decode=[0]), pair.batch, pool)
    pair.batch.tables[0, 1] = 0
    pair.batch.tokens[0, 3] = 131
    with pytest.raises(ValueError, match="does not exist"):
        native.forward(StepPlan(chunks=[Chunk(0, 0, 20)]), pair.batch, pool)
    assert pool.isnan().all()


def test_a_row_of_nan_stays_in_its_row() -> None:
    pair = Pair(PAIRWISE[0], [5, 9])
    native = pair.decoders[1]
    native.forward(StepPlan(chunks=[Chunk(0, 0, 5), Chunk(1, 0, 9)]), pair.batch, pair.pools[1])
    pair.pools[1][pair.batch.tables[0, 0], 0, 1, 0, 2, :] = torch.nan
    logits = native.logits(native.forward(StepPlan(decode=[0, 1]), pair.batch, pair.pools[1]))
    assert logits[0].isnan().all()
    assert logits[1].isfinite().all()


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("window", [0, 290])
def test_a_row_alone_is_the_same_as_among_others(num_threads: int, window: int) -> None:
    """To the bit, over one span of cached tokens and over several, however threads share them."""
    lengths = [700, 37, 256, 257, 513, *range(3, 15)]
    pair = Pair(Shape(64, 3, 3, 16, window, "bfloat16", num_threads, False), lengths)
    native, pool = pair.decoders[1], pair.pools[1]
    for slot, length in enumerate(lengths):
        native.forward(StepPlan(chunks=[Chunk(slot, 0, length)]), pair.batch, pool)
    together = native.forward(StepPlan(decode=list(range(len(lengths)))), pair.batch, pool)
    for slot in range(len(lengths)):
        alone = native.forward(StepPlan(decode=[slot]), pair.batch, pool)
        assert torch.equal(alone[0], together[slot]), lengths[slot]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_row_is_the_same_among_any_number_of_others(num_threads: int) -> None:
    """To the bit: how many rows a product keeps in registers depends on how many there are."""
    lengths = list(range(3, 29))
    pair = Pair(Shape(64, 3, 3, 16, 0, "bfloat16", num_threads, False), lengths)
    native, pool = pair.decoders[1], pair.pools[1]
    native.forward(StepPlan(chunks=[Chunk(slot, 0, length) for slot, length in enumerate(lengths)]), pair.batch, pool)
    together = native.forward(StepPlan(decode=list(range(len(lengths)))), pair.batch, pool)
    logits = native.logits(together)
    for rows in range(1, len(lengths)):
        fewer = native.forward(StepPlan(decode=list(range(rows))), pair.batch, pool)
        assert torch.equal(fewer, together[:rows]), rows
        assert torch.equal(native.logits(fewer), logits[:rows]), rows


def test_phases_are_timed_for_who_asks() -> None:
    pair = Pair(PAIRWISE[0], [20])
    native, pool, plan = pair.decoders[1], pair.pools[1], StepPlan(chunks=[Chunk(0, 0, 20)])
    native.logits(native.forward(plan, pair.batch, pool))
    assert set(native.take_phase_seconds().values()) == {0.0}
    native.time_phases()
    native.logits(native.forward(plan, pair.batch, pool))
    seconds = native.take_phase_seconds()
    assert all(0 < phase < 10 for phase in seconds.values())
    assert set(native.take_phase_seconds().values()) == {0.0}


def test_no_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NativeUnavailableError, match="install gcc or clang"):
        load_library("bfloat16", tmp_path)


def test_compiling_takes_seconds_and_is_done_once(tmp_path: Path) -> None:
    began = time.monotonic()
    path = source_for("bfloat16").build(tmp_path)
    assert time.monotonic() - began < 20
    made = path.stat()
    assert source_for("bfloat16").build(tmp_path) == path
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns)


def test_a_broken_file_is_made_again(tmp_path: Path) -> None:
    path = source_for("float32").build(tmp_path)
    path.write_bytes(b"short")
    load_library("float32", tmp_path)
    assert path.stat().st_size > 1000
    assert source_for("float32").build(tmp_path) == path
    assert list(path.parent.iterdir()) == [path]

"""Whole steps of whole models with random weights."""

import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

from benchmarks.device.kernels import attention_flops
from benchmarks.device.peaks import BLOCK, DTYPE, Row, Shape
from benchmarks.limits import Limits
from tailrace.engine.engine import Engine, EngineOptions, load_engine
from tailrace.engine.models.loading import tensor_shapes
from tailrace.plan import Chunk, SequenceStart, StepOutput, StepPlan
from tailrace.types import SamplingParams

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


def dummy_engine(
    shape: Shape, device: str, *, batch: int, longest: int, num_blocks: int | None = None, eager: bool = False
) -> Engine:
    """Room for `batch` sequences of `longest` tokens, unless `num_blocks` says otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape.config(longest)))
        return load_engine(
            EngineOptions(
                Path(folder),
                dtype="bfloat16",
                num_blocks=num_blocks or batch * -(-longest // BLOCK),
                max_num_seqs=batch,
                load_format="dummy",
                device=device,
                enforce_eager=eager,
                native=False,
            )
        )


def model_rows(shape: Shape, device: str, *, batch: int, context: int, prompt: int, steps: int = 32) -> Iterator[Row]:
    """Whole steps of the runner, sampling and the copy of the tokens to the host included."""
    longest = max(context + 2 * steps, prompt + 1)  # a prompt is followed by the token drawn
    num_blocks = max(batch * -(-(context + 2 * steps) // BLOCK), -(-longest // BLOCK))
    engine = dummy_engine(shape, device, batch=batch, longest=longest, num_blocks=num_blocks)
    weights = sum(map(prod, tensor_shapes(engine.config).values())) - (0 if shape.tied else shape.vocab * shape.hidden)
    linear = weights - shape.vocab * shape.hidden
    seconds = statistics.median(prefill(engine, prompt).elapsed_s for _ in range(5))
    flops = 2.0 * linear * prompt + shape.layers * attention_flops(shape, prompt)
    yield Row(f"{shape.name} prefill {prompt}", seconds, flops=flops, asked=Limits(0.50, 0.65))
    for size in sorted({1, batch}):
        seconds = statistics.median(step.elapsed_s for step in decode(engine, size, context, steps))
        cached = size * (context + steps / 2) * engine.layout.bytes_per_token
        read = weights * DTYPE.itemsize + cached
        asked = Limits(0.65, 0.80) if size == batch else None
        yield Row(f"{shape.name} decode {size} x {context}", seconds, read, asked=asked)


def compare_graphs(shape: Shape, device: str, *, batch: int, context: int, steps: int = 32, rounds: int = 5) -> bool:
    """Prints how much longer a decode step takes op by op than by CUDA graphs, the two by turns in one process.

    True when both draw the same tokens.
    """
    longest = context + 2 * steps
    with_graphs, eager = (
        dummy_engine(shape, device, batch=batch, longest=longest, eager=eager) for eager in (False, True)
    )
    ratios, agree = [], True
    for _ in range(rounds):
        on, off = (decode(engine, batch, context, steps) for engine in (with_graphs, eager))
        agree &= [step.tokens for step in on] == [step.tokens for step in off]
        seconds = [statistics.median(step.elapsed_s for step in arm) for arm in (on, off)]
        ratios.append(seconds[1] / seconds[0])
    name = f"{shape.name} decode {batch} x {context}: eager over graphs"
    times = f"{seconds[1] * 1e6:.0f} us over {seconds[0] * 1e6:.0f} us"
    middle = statistics.median(ratios)
    spread = f"{middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"{name:<52} {spread}, {times}{Limits(2, 3).beside(middle)}")
    print(f"{'ok' if agree else 'DIFFERS':<8} {shape.name} tokens with and without graphs")
    return agree


def start(slot: int, num_tokens: int, longest: int, drawn: Sequence[int] = ()) -> SequenceStart:
    """A prompt of `num_tokens`, the tokens drawn after it, and blocks for `longest`."""
    blocks = -(-longest // BLOCK)
    tokens = [(slot + index) % 1000 for index in range(num_tokens)]
    return SequenceStart(
        slot, [*tokens, *drawn], num_tokens, GREEDY, 0, list(range(slot * blocks, (slot + 1) * blocks))
    )


def prefill(engine: Engine, prompt: int, *, slot: int = 0, longest: int = 0) -> StepOutput:
    """The prompt of a slot in one step, with room for `longest` tokens; draws its first token."""
    started = start(slot, prompt, longest or prompt + 1)
    return engine.runner.run(StepPlan(released=[slot], started=[started], chunks=[Chunk(slot, 0, prompt, (0,))]))


def decode(engine: Engine, batch: int, context: int, steps: int) -> list[StepOutput]:
    slots = list(range(batch))
    for slot in slots:
        prefill(engine, context, slot=slot, longest=context + 2 * steps)
    return [engine.runner.run(StepPlan(decode=slots)) for _ in range(steps)]


def decode_started(engine: Engine, slots: Sequence[int], steps: int) -> list[int]:
    """The tokens that `steps` steps draw, step after step."""
    return [token for _ in range(steps) for token in engine.runner.run(StepPlan(decode=slots)).tokens]

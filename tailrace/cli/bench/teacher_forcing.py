"""What an engine holds for likely at every place of a given text, by the kernels of either way to compute it.

Whatever it would have drawn, the text's own next token follows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tailrace.engine.engine import Engine
from tailrace.plan import Chunk, SequenceStart, StepPlan
from tailrace.types import SamplingParams

_ROWS_AT_ONCE = 64
_SAMPLING = SamplingParams(temperature=0.0)
"""Nothing is drawn, but a sequence has to begin with some."""


@dataclass(frozen=True, slots=True)
class Places:
    """Some places of the text."""

    logits: Tensor
    """[places, vocab] float32; overwritten by the engine's next ones."""
    tokens: Tensor
    """[places] int64: what stands there."""


@torch.inference_mode()
def by_prefill(engine: Engine, windows: Sequence[Sequence[int]], *, chunk_tokens: int) -> Iterator[Places]:
    """Window after window, in the chunks of a prefill worker; of each window all tokens but the first."""
    runner = engine.runner
    for window in windows:
        tokens = torch.tensor(window)
        for begin in range(0, len(window), chunk_tokens):
            end = min(begin + chunk_tokens, len(window))
            started = () if begin else (_start(engine, 0, window, len(window)),)
            step = runner.forward(StepPlan(started=started, chunks=(Chunk(0, begin, end),)))
            assert step is not None
            for first in range(begin, min(end, len(window) - 1), _ROWS_AT_ONCE):
                last = min(first + _ROWS_AT_ONCE, end, len(window) - 1)
                logits = runner.model.logits(step.hidden[first - begin : last - begin], reuse=True)
                yield Places(logits, tokens[first + 1 : last + 1])


@torch.inference_mode()
def by_decode(engine: Engine, windows: Sequence[Sequence[int]]) -> Iterator[Places]:
    """All windows as one batch, a token of each a step; of each window all tokens but the first."""
    runner = engine.runner
    started: Sequence[SequenceStart] = [
        _start(engine, slot, window[:1], len(window)) for slot, window in enumerate(windows)
    ]
    for place in range(1, max(map(len, windows))):
        slots = [slot for slot, window in enumerate(windows) if place < len(window)]
        step = runner.forward(StepPlan(started=started, decode=slots))
        assert step is not None
        forced = torch.tensor([windows[slot][place] for slot in slots])
        yield Places(step.logits, forced)
        runner.batch.take(step.draws, step.columns, forced)
        started = ()


def _start(engine: Engine, slot: int, tokens: Sequence[int], room_for: int) -> SequenceStart:
    """With blocks of its own for `room_for` tokens."""
    num_blocks = -(-engine.max_model_len // engine.layout.block_size)
    first = slot * num_blocks
    blocks = range(first, first - (-room_for // engine.layout.block_size))
    return SequenceStart(slot, tokens, len(tokens), _SAMPLING, 0, blocks)

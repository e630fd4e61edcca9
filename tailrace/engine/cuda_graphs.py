"""Decode steps as CUDA graphs: captured at start for a few batch sizes, then replayed instead of launched op by op.

A graph repeats its launches with the addresses and shapes of its capture. So a step of n sequences replays the graph of
the next size up. What changes from step to step is on the device already, in the rows of `BatchState`; the host only
says which slots decode, and only when these change. Rows of the graph without a sequence read the empty slot behind the
last: no tokens, hence nothing to attend to, and nowhere to write.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from tailrace.engine.batch import AttentionRows, BatchState, Draws, StepInputs
from tailrace.engine.kernels.attention_decode import decode_rows
from tailrace.engine.kernels.kv_write import NO_ROW, write_rows
from tailrace.plan import StepPlan

_log = logging.getLogger(__name__)
_MAX_CAPTURED = 512
"""Sequences; beyond, launches cost little beside what they compute."""
_WARM_UPS = 2


class GraphModel(Protocol):
    """What a decode step asks of a model: models.decoder.Decoder is one."""

    @property
    def windows(self) -> Sequence[int]: ...

    def compute(self, inputs: StepInputs, pool: Tensor) -> Tensor: ...

    def logits(self, hidden: Tensor, *, reuse: bool = False) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """What a step of decode rows computed; the next replay of any graph writes over it."""

    hidden: Tensor
    """[rows, hidden]"""
    logits: Tensor
    """[rows, vocab] float32"""
    slots: Tensor
    choices: Tensor
    positions: Tensor
    """Each [rows] int64, as of Draws."""

    def first(self, count: int) -> "DecodeStep":
        columns = self.hidden, self.logits, self.slots, self.choices, self.positions
        return DecodeStep(*(column[:count] for column in columns))

    @property
    def draws(self) -> Draws:
        return Draws(None, None, self.slots, self.choices, self.positions, None)


@dataclass(frozen=True, slots=True)
class Graph:
    """`replay` computes `step` again, into the same memory, from what the inputs hold by then."""

    replay: Callable[[], None]
    step: DecodeStep


class Recorder(Protocol):
    def record(self, compute: Callable[[], DecodeStep]) -> Graph:
        """Raises RuntimeError where the device does not take part."""
        ...

    def used_bytes(self) -> int:
        """Of the device, by everything."""
        ...


class CudaRecorder:
    """Graphs of one device. They share their memory: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, compute: Callable[[], DecodeStep]) -> Graph:
        # Kernels are compiled and libraries make their handles before the capture, on the stream that is captured.
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                compute()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # What other threads ask of the device meanwhile is no part of the capture, and does not end it.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            step = compute()
        return Graph(graph.replay, step)

    def used_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free


class DecodeGraphs:
    """The graphs of one runner, of batches of `sizes` rows. `batch` has an empty slot behind those of sequences."""

    def __init__(
        self, model: GraphModel, batch: BatchState, pool: Tensor, sizes: Sequence[int], recorder: Recorder
    ) -> None:
        self._sizes = sorted(sizes)
        self._empty_slot = len(batch.lengths) - 1
        largest = self._sizes[-1]
        self._slots = torch.full((largest,), self._empty_slot, dtype=torch.int64, device=batch.device)
        self._staged = [self._empty_slot] * largest
        # The largest first: the memory that it takes serves all the others.
        self._graphs = {
            size: recorder.record(partial(padded_step, model, batch, self._slots[:size], pool))
            for size in reversed(self._sizes)
        }

    def replay(self, plan: StepPlan) -> DecodeStep | None:
        """Computes the step of `plan`, which is applied already; None when it has to be run op by op."""
        size = graph_size(plan, self._sizes)
        if size is None:
            return None
        self._stage(plan.decode, size)
        graph = self._graphs[size]
        graph.replay()
        return graph.step.first(len(plan.decode))

    def _stage(self, decode: Sequence[int], size: int) -> None:
        wanted = padded_slots(decode, size, self._empty_slot)
        if wanted == self._staged[:size]:
            return
        # Of its own for each change: the copy may still read it when the next step is prepared.
        host = torch.tensor(wanted, dtype=torch.int64, pin_memory=self._slots.is_cuda)
        self._slots[:size].copy_(host, non_blocking=True)
        self._staged[:size] = wanted


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Powers of two below max_num_seqs, and that itself; none above the most that is captured."""
    most = min(max_num_seqs, _MAX_CAPTURED)
    return [1 << exponent for exponent in range((most - 1).bit_length())] + [most]


def graph_size(plan: StepPlan, sizes: Sequence[int]) -> int | None:
    """The size of the graph that computes this plan, the least of `sizes` (rising) that holds it; None: none does."""
    if plan.chunks or not plan.decode:
        return None
    return next((size for size in sizes if size >= len(plan.decode)), None)


def padded_slots(decode: Sequence[int], size: int, empty_slot: int) -> list[int]:
    return [*decode, *[empty_slot] * (size - len(decode))]


def padded_step(model: GraphModel, batch: BatchState, slots: Tensor, pool: Tensor) -> DecodeStep:
    """A decode step of `slots` [rows] int64, empty ones among them. Shapes depend on the number of rows alone.

    Nothing here waits for the device, nor does the host look at what is on it.
    """
    inputs = padded_inputs(batch, slots, pool, model.windows)
    hidden = model.compute(inputs, pool)
    # Copies: the state goes on to the next step while what this one drew is on its way to the host.
    return DecodeStep(hidden, model.logits(hidden), slots.clone(), batch.choices[slots], batch.lengths[slots])


def padded_inputs(batch: BatchState, slots: Tensor, pool: Tensor, windows: Sequence[int]) -> StepInputs:
    """As BatchState.inputs, of decode rows whose slots may be empty: these attend to nothing and are not written."""
    lengths, tables = batch.lengths[slots], batch.tables[slots]
    positions = (lengths - 1).clamp_(min=0)
    blocks = tables.gather(1, (positions // batch.block_size).unsqueeze(1)).squeeze(1).long()
    rows = write_rows(pool, blocks, positions % batch.block_size)
    rows.masked_fill_((lengths == 0).unsqueeze(1), NO_ROW)
    attention = {
        window: AttentionRows(len(slots), decode_rows(pool, tables, lengths, [], window), ()) for window in windows
    }
    return StepInputs(batch.tokens[slots, positions].long(), positions, rows, attention)


def capture(
    model: GraphModel, batch: BatchState, pool: Tensor, max_num_seqs: int, recorder: Recorder
) -> DecodeGraphs | None:
    """None, with a loud warning, where the capture fails: every step is then run op by op."""
    began, before = time.perf_counter(), recorder.used_bytes()
    sizes = graph_sizes(max_num_seqs)
    try:
        graphs = DecodeGraphs(model, batch, pool, sizes, recorder)
    except RuntimeError as error:
        _log.warning("CUDA GRAPHS ARE OFF and small batches decode several times slower: the capture failed: %s", error)
        return None
    _log.info(
        "captured %d CUDA graphs of decode steps, for batches up to %d: %.1f s, %.0f MiB",
        len(sizes),
        sizes[-1],
        time.perf_counter() - began,
        (recorder.used_bytes() - before) / (1 << 20),
    )
    return graphs

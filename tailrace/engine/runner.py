"""ModelRunner: executes StepPlans, one batched forward pass a step."""

import time
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tailrace.checkpoint.model_config import ModelConfig
from tailrace.engine.batch import BatchState, DrawColumns, Draws
from tailrace.engine.cuda_graphs import DecodeGraphs
from tailrace.engine.host_copies import HostCopy
from tailrace.engine.kv_cache import KVCache
from tailrace.engine.sampler import Drawn, SamplingState, sample
from tailrace.plan import StepOutput, StepPlan


class Model(Protocol):
    """What models.decoder.Decoder is, and what other implementations of it are."""

    config: ModelConfig

    def forward(self, plan: StepPlan, batch: BatchState, pool: Tensor) -> Tensor: ...

    def logits(self, hidden: Tensor, *, reuse: bool = False) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class StepLogits:
    """What a step computed, before anything is drawn."""

    hidden: Tensor
    """[tokens, hidden]: decode rows, then chunk after chunk; `Model.logits` turns any of them into logits."""
    draws: Draws
    columns: DrawColumns
    logits: Tensor
    """[draws, vocab] float32; overwritten by the next step."""


class StepClock:
    """How long steps compute that are launched one behind another."""

    def __init__(self) -> None:
        self._last_end = 0.0

    def elapsed(self, began: float) -> float:
        """Seconds since it began, or since the step before it ended. To be asked when a step has ended."""
        now = time.perf_counter()
        begun, self._last_end = max(began, self._last_end), now
        return now - begun


@dataclass(frozen=True, slots=True)
class LaunchedDraws:
    """A step that a device computes, or has computed."""

    columns: DrawColumns
    drawn: Drawn | None
    """None: nothing is drawn."""
    over: HostCopy
    clock: StepClock
    began: float

    def wait(self) -> StepOutput:
        self.over.wait()
        if self.drawn is None:
            return StepOutput(elapsed_s=self.clock.elapsed(self.began))
        result = self.drawn.wait()
        return StepOutput(
            slots=self.columns.slots,
            choices=self.columns.choices,
            positions=self.columns.positions,
            tokens=result.token_ids,
            logprobs=result.logprobs,
            bad_rows=result.bad_rows,
            elapsed_s=self.clock.elapsed(self.began),
        )


class ModelRunner:
    """Owns the batch's rows. Used by one thread.

    A plan must keep these: slots below max_num_seqs, chunks within their slot's tokens, enough blocks in a slot's table
    for every token it computes, and no sequence longer than max_model_len.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        batch: BatchState,
        sampling: SamplingState,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.model = model
        self._graphs = graphs
        self.batch = batch
        self._cache = cache
        self._sampling = sampling
        self._clock = StepClock()

    def launch(self, plan: StepPlan) -> LaunchedDraws:
        """A CUDA device computes it when it gets to it; a CPU has done so when this returns.

        Raises ValueError for a plan that names rows or tokens that do not exist.
        """
        began = time.perf_counter()
        with torch.inference_mode():
            step = self.forward(plan)
            if step is None or not step.columns.slots:
                nothing = self._cache.tensor.new_empty(0, dtype=torch.int32)
                return LaunchedDraws(DrawColumns.none(), None, HostCopy(nothing), self._clock, began)
            drawn = self._draw(step)
        return LaunchedDraws(step.columns, drawn, drawn.copy, self._clock, began)

    def run(self, plan: StepPlan) -> StepOutput:
        """Launches the plan and waits for it."""
        return self.launch(plan).wait()

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> StepLogits | None:
        """Applies the plan and computes its tokens, but draws none. None when there is nothing to compute."""
        self._apply(plan)
        if plan.is_empty:
            return None
        columns = self.batch.draw_columns(plan)
        if self._graphs is not None and (step := self._graphs.replay(plan)) is not None:
            return StepLogits(step.hidden, step.draws, columns, step.logits)
        draws = self.batch.draws(plan, columns)
        hidden = self.model.forward(plan, self.batch, self._cache.tensor)
        rows = hidden if draws.rows is None else hidden[draws.rows]
        logits = self.model.logits(rows, reuse=True)
        return StepLogits(hidden, draws, columns, logits if draws.logit_rows is None else logits[draws.logit_rows])

    def _apply(self, plan: StepPlan) -> None:
        for slot in plan.released:
            self._sampling.clear(slot)
        self.batch.update(plan.started, plan.appended)
        for start in plan.started:
            self._sampling.set(start.slot, start.sampling, start.num_prompt_tokens)
        for copy in plan.copies:
            self._cache.copy_block(copy.source, copy.target)

    def _draw(self, step: StepLogits) -> Drawn:
        draws, columns = step.draws, step.columns
        drawn = sample(
            step.logits, self._sampling, draws.slots, draws.choices, draws.positions, self.batch.tokens, columns.slots
        )
        self.batch.take(draws, columns, drawn.token_ids)
        return drawn

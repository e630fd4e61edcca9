"""ModelRunner: executes StepPlans, one batched forward pass a step."""

import time
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tailrace.checkpoint.model_config import ModelConfig
from tailrace.engine.batch import BatchState, Draws
from tailrace.engine.cuda_graphs import DecodeGraphs
from tailrace.engine.kv_cache import KVCache
from tailrace.engine.sampler import SamplingState, sample
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
    logits: Tensor
    """[draws, vocab] float32; overwritten by the next step."""


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

    def launch(self, plan: StepPlan) -> StepOutput:
        """As `run`: it computes in the calling thread, and gives back what is over."""
        return self.run(plan)

    def run(self, plan: StepPlan) -> StepOutput:
        """Raises ValueError for a plan that names rows or tokens that do not exist."""
        began = time.perf_counter()
        with torch.inference_mode():
            step = self.forward(plan)
            output = self._draw(step) if step is not None and len(step.draws.slots) else StepOutput()
        output.elapsed_s = time.perf_counter() - began
        return output

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> StepLogits | None:
        """Applies the plan and computes its tokens, but draws none. None when there is nothing to compute."""
        self._apply(plan)
        if plan.is_empty:
            return None
        if self._graphs is not None and (step := self._graphs.replay(plan)) is not None:
            return StepLogits(step.hidden, step.draws, step.logits)
        draws = self.batch.draws(plan)
        hidden = self.model.forward(plan, self.batch, self._cache.tensor)
        rows = hidden if draws.rows is None else hidden[draws.rows]
        logits = self.model.logits(rows, reuse=True)
        return StepLogits(hidden, draws, logits if draws.logit_rows is None else logits[draws.logit_rows])

    def _apply(self, plan: StepPlan) -> None:
        for slot in plan.released:
            self._sampling.clear(slot)
        for start in plan.started:
            self.batch.start(start)
            self._sampling.set(start.slot, start.sampling, start.num_prompt_tokens)
        for append in plan.appended:
            self.batch.append_blocks(append)
        for copy in plan.copies:
            self._cache.copy_block(copy.source, copy.target)

    def _draw(self, step: StepLogits) -> StepOutput:
        draws = step.draws
        result = sample(step.logits, self._sampling, draws.slots, draws.choices, draws.positions, self.batch.tokens)
        self.batch.take(draws, result.token_ids)
        return StepOutput(
            slots=draws.slots.tolist(),
            choices=draws.choices.tolist(),
            positions=draws.positions.tolist(),
            tokens=result.token_ids.tolist(),
            logprobs=result.logprobs,
            bad_rows=result.bad_rows,
        )

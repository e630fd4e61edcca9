"""The engine without any service: the decode worker's scheduler and runner, driven in this process, step by step."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tailrace.engine.engine import Engine, EngineOptions, load_engine
from tailrace.errors import ConfigError
from tailrace.kv.block_pool import BlockPool
from tailrace.kv.hashing import chain_seed, hash_blocks
from tailrace.plan import StepPlan
from tailrace.policy.decode_scheduler import DecodeScheduler
from tailrace.policy.request import Request, StopRule, blocks_for
from tailrace.policy.sequence import DecodeStep
from tailrace.types import SamplingParams
from tailrace.worker.compute_thread import ComputeThread
from tailrace.worker.runner import PendingStep, Runner

FIRST_ORDINARY_TOKEN = 1000
"""Below it lie control tokens and single bytes, in the vocabularies that are large enough."""


@dataclass(frozen=True, slots=True)
class LoopOptions:
    model_dir: Path
    max_batch: int
    max_tokens: int
    """Of one sequence, prompt and output together."""
    threads: int = 1
    dtype: str = "auto"
    quantization: str = "none"
    load_format: str = "auto"
    block_size: int = 16
    max_num_batched_tokens: int = 512


@dataclass(frozen=True, slots=True)
class StepTimes:
    """One step. Seconds; `model_s` (forward and logits) is part of `run_s`, or computed beside it in overlapped steps.

    Of overlapped steps `schedule_s` is of the one behind, and `run_s` what is left to wait for.
    """

    num_decode: int
    prompt_tokens: int
    context_tokens: int
    """Of all sequences together, before the step."""
    attended_tokens: int
    """Sum over the chunks' tokens of how many tokens each attends to."""
    schedule_s: float
    run_s: float
    model_s: float
    finish_s: float
    phases_s: dict[str, float] = field(default_factory=dict)
    """What of `model_s` each phase took, where phases are timed."""

    @property
    def step_s(self) -> float:
        return self.schedule_s + self.run_s + self.finish_s

    @property
    def scheduler_s(self) -> float:
        return self.schedule_s + self.finish_s


@dataclass(slots=True)
class RunTimes:
    """One whole generation: `wall_s` from the first submission to the last token."""

    output_tokens: int = 0
    wall_s: float = 0.0
    steps: list[StepTimes] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    """What each prompt was continued by."""

    @property
    def output_tokens_per_s(self) -> float:
        return self.output_tokens / self.wall_s


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step that was launched."""

    plan: StepPlan
    pending: PendingStep
    context_tokens: int
    schedule_s: float


class ModelClock:
    """Adds up the seconds spent in a model's methods, by standing in for them."""

    def __init__(self, model: Any, methods: Sequence[str] = ("forward", "logits")) -> None:
        self._seconds = 0.0
        for name in methods:
            setattr(model, name, self._timed(getattr(model, name)))

    def take(self) -> float:
        """Seconds since the last time."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self._seconds += time.perf_counter() - began

        return call


class EngineLoop:
    """A loaded engine. Raises ConfigError or CheckpointError as `load_engine` does."""

    def __init__(self, options: LoopOptions) -> None:
        num_blocks = max(2, options.max_batch * blocks_for(options.max_tokens + 1, options.block_size))
        self.engine: Engine = load_engine(
            EngineOptions(
                options.model_dir,
                dtype=options.dtype,
                quantization=options.quantization,
                block_size=options.block_size,
                num_blocks=num_blocks,
                max_num_seqs=options.max_batch,
                max_model_len=options.max_tokens,
                load_format=options.load_format,
                num_threads=options.threads,
            )
        )
        self.options = options
        self._clock = ModelClock(self.engine.runner.model)
        self._scheduler = DecodeScheduler(
            BlockPool(num_blocks, epoch=1, prefix_caching=False),
            block_size=options.block_size,
            max_num_seqs=options.max_batch,
            max_num_batched_tokens=options.max_num_batched_tokens,
            stop=StopRule(frozenset(self.engine.config.eos_token_ids), self.engine.max_model_len),
            window=self.engine.layout.window,
        )
        self._take_phases: Callable[[], dict[str, float]] = dict
        self._hash_seed = chain_seed(self.engine.layout.fingerprint)
        self._next_id = 1
        self._ahead: _Flight | None = None
        """Of overlapped steps: launched behind the one that was finished last."""

    def time_phases(self) -> None:
        """From now on each step says where its time went. Raises ConfigError where only compiled kernels could."""
        model: Any = self.engine.runner.model
        if not hasattr(model, "time_phases"):
            raise ConfigError("phases: only the compiled kernels time them, and they are off here")
        model.time_phases()
        self._take_phases = model.take_phase_seconds

    def generate(self, prompts: Sequence[Sequence[int]], output_tokens: int, *, overlap: bool = False) -> RunTimes:
        """Greedy, exactly `output_tokens` a prompt, whatever the model says.

        `overlap`: a step is scheduled while the one before it computes in a thread of its own, as in a worker.
        """
        times = RunTimes()
        compute = ComputeThread(self.engine.runner)
        runner = compute if overlap else self.engine.runner
        sampling = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
        drawn: dict[int, list[int]] = {}
        began = time.perf_counter()
        for prompt in prompts:
            drawn[self._submit(list(prompt), sampling)] = []
        num_open = len(prompts)
        while num_open:
            step = self._step(times, runner, overlap=overlap)
            for handle, token in zip(step.tokens.handles, step.tokens.token_ids, strict=True):
                drawn[handle].append(token)
            num_open -= len(step.finished)
        times.wall_s = time.perf_counter() - began
        compute.close()
        times.tokens = list(drawn.values())
        times.output_tokens = sum(map(len, times.tokens))
        return times

    def _submit(self, tokens: list[int], sampling: SamplingParams) -> int:
        """The request's id."""
        request_id, self._next_id = self._next_id, self._next_id + 1
        hashes = hash_blocks(tokens, self.options.block_size, self._hash_seed)
        self._scheduler.submit_local(
            Request(request_id, tokens, len(tokens), sampling, hash_seed=self._hash_seed, hashes=hashes)
        )
        return request_id

    def _step(self, times: RunTimes, runner: Runner, *, overlap: bool) -> DecodeStep:
        begun = time.perf_counter()
        launched: list[_Flight] = []
        flight = self._ahead or self._launch(runner, launched)
        assert flight is not None, "something is left to compute"
        self._ahead = self._launch(runner, launched) if overlap else None
        out = flight.pending.wait()
        model_s = self._clock.take()
        ran = time.perf_counter()
        step = self._scheduler.finish(flight.plan, out)
        finished = time.perf_counter()
        schedule_s = sum(flight.schedule_s for flight in launched)
        times.steps.append(
            StepTimes(
                num_decode=len(flight.plan.decode),
                prompt_tokens=flight.plan.num_tokens - len(flight.plan.decode),
                context_tokens=flight.context_tokens,
                attended_tokens=_attended(flight.plan),
                schedule_s=schedule_s,
                run_s=ran - begun - schedule_s,
                model_s=model_s,
                finish_s=finished - ran,
                phases_s=self._take_phases(),
            )
        )
        return step

    def _launch(self, runner: Runner, launched: list[_Flight]) -> _Flight | None:
        """Also adds it to `launched`. None: there is nothing to compute."""
        begun = time.perf_counter()
        plan = self._scheduler.schedule()
        schedule_s = time.perf_counter() - begun
        if not plan.changes_anything:
            return None
        context_tokens = sum(len(sequence.tokens) for sequence in self._scheduler.sequences())
        launched.append(_Flight(plan, runner.launch(plan), context_tokens, schedule_s))
        return launched[-1]


def random_prompts(count: int, num_tokens: int, vocab_size: int, *, seed: int = 0) -> list[list[int]]:
    """All different, so that nothing can be shared."""
    draw = random.Random(seed)  # noqa: S311 - test data
    first = FIRST_ORDINARY_TOKEN if vocab_size > 2 * FIRST_ORDINARY_TOKEN else 0
    return [[draw.randrange(first, vocab_size) for _ in range(num_tokens)] for _ in range(count)]


def _attended(plan: StepPlan) -> int:
    return sum((chunk.end * (chunk.end + 1) - chunk.start * (chunk.start + 1)) // 2 for chunk in plan.chunks)

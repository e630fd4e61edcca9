"""A prefill worker under virtual time: the product's own PrefillScheduler and BlockPool, with a formula for each step.

A prompt whose prefix is being fetched keeps its place in line: overtaken by one long prompt, it would lose more than
the fetch gains.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from tailrace.index.prefix_index import PrefixIndex
from tailrace.kv.block_pool import BlockPool
from tailrace.plan import StepOutput, StepPlan
from tailrace.policy.estimates import PrefillFit
from tailrace.policy.prefill_scheduler import PrefillScheduler
from tailrace.policy.request import Request, StopRule
from tailrace.policy.routing import WorkerView
from tailrace.sim.profile import HardwareProfile
from tailrace.sim.workload import MAX_TOKENS, SimRequest
from tailrace.types import Role, SamplingParams

EPOCH = 1
LAYOUT = b"simulated"
_SAMPLING = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
_STOP = StopRule(frozenset(), 2 * MAX_TOKENS)


@dataclass(slots=True, eq=False)
class PrefillJob:
    """One request on its way through a prefill worker."""

    number: int
    request: SimRequest
    decode_id: str
    fetch_tier: str = ""
    landed_from: int | None = None
    """Blocks from here on were fetched; None: none."""
    started_s: float | None = None
    # When it is computed.
    hit_tokens: int = 0
    fetched_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Landing:
    """Blocks that a fetch writes, and the worker's own ones before them, which stay meanwhile."""

    own: Sequence[int]
    blocks: Sequence[int]


@dataclass(slots=True)
class _Step:
    plan: StepPlan
    seconds: float


@dataclass(slots=True)
class PrefillNode:
    """Event loop: `accept`, then `start` whenever something changed, then `finish` at the time that `start` named."""

    worker_id: str
    num_blocks: int
    block_tokens: int
    profile: HardwareProfile
    pool: BlockPool = field(init=False)
    busy_s: float = 0.0
    next_sequence: int = 0
    _scheduler: PrefillScheduler = field(init=False)
    _jobs: dict[int, PrefillJob] = field(default_factory=dict)
    _step: _Step | None = None
    _line: deque[PrefillJob] = field(default_factory=deque)
    """Not submitted yet: the first one's prefix is being fetched."""
    _fetching: set[int] = field(default_factory=set)
    _fit: PrefillFit = field(default_factory=PrefillFit)
    _view: WorkerView | None = None

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.num_blocks, epoch=EPOCH)
        self._scheduler = PrefillScheduler(
            self.pool,
            block_size=self.block_tokens,
            max_num_seqs=self.profile.max_num_seqs,
            max_num_batched_tokens=self.profile.chunk_tokens,
            stop=_STOP,
        )

    def accept(self, job: PrefillJob, *, lands: bool = False) -> None:
        """`lands`: its prefix is being fetched."""
        self._line.append(job)
        if lands:
            self._fetching.add(job.number)
        self._move_up()

    def _move_up(self) -> None:
        while self._line and self._line[0].number not in self._fetching:
            self._submit(self._line.popleft())
        self._view = None

    def _submit(self, job: PrefillJob) -> None:
        request = job.request
        self._jobs[job.number] = job
        # Of the tokens the scheduler looks at their number only.
        tokens = cast("list[int]", range(request.num_prompt_tokens))
        hashes = list(request.full_hashes(self.block_tokens))
        self._scheduler.submit(Request(job.number, tokens, request.num_prompt_tokens, _SAMPLING, hashes=hashes))

    @property
    def is_computing(self) -> bool:
        return self._step is not None

    def start(self, now_s: float, slowdown: float = 1.0) -> float | None:
        """Begins a step, unless one runs; how many seconds it takes. None: there is nothing that could be computed."""
        if self._step is not None:
            return None
        plan = self._scheduler.schedule()
        if plan.is_empty:
            if plan.changes_anything:
                self._scheduler.finish(plan, StepOutput())
            return None
        seconds = slowdown * self.profile.step_s([(chunk.start, chunk.end) for chunk in plan.chunks])
        if plan.started:
            self._note_starts(now_s)
        self._step = _Step(plan, seconds)
        self._view = None
        self._fit.add_step(((chunk.start, chunk.end) for chunk in plan.chunks), seconds)
        self.busy_s += seconds
        return seconds

    def _note_starts(self, now_s: float) -> None:
        for started in self._scheduler.jobs():
            job = self._jobs.get(started.request.id)
            if job is not None and job.started_s is None:
                job.started_s = now_s

    def finish(self) -> list[PrefillJob]:
        """The prompts that the step has computed. Their blocks stay until `give_back`."""
        step = self._step
        if step is None:
            raise AssertionError(f"{self.worker_id} computes nothing that could finish")
        self._step = self._view = None
        num_drawn = sum(len(chunk.choices) for chunk in step.plan.chunks)
        out = StepOutput(tokens=[0] * num_drawn, elapsed_s=step.seconds)
        done: list[PrefillJob] = []
        for progress in self._scheduler.finish(step.plan, out).progressed:
            if progress.is_computed:
                job = self._jobs.pop(progress.request.id)
                own = progress.num_cached_tokens
                if job.landed_from is not None:
                    own = min(own, job.landed_from * self.block_tokens)
                job.hit_tokens, job.fetched_tokens = own, progress.num_cached_tokens - own
                done.append(job)
        return done

    def publish(self, index: PrefixIndex) -> None:
        """Tells the index what changed in the cache, as a worker does after each step."""
        if events := self.pool.drain_events():
            index.apply(self.worker_id, EPOCH, self.next_sequence, events)
            self.next_sequence += len(events)

    def give_back(self, job: PrefillJob) -> None:
        """The decode worker has pulled it."""
        self._scheduler.drop(job.number)
        self._view = None

    # -- fetching -----------------------------------------------------------------------------------------------------

    def begin_landing(self, hashes: Sequence[bytes], depth: int) -> Landing | None:
        """Room for what of the first `depth` blocks is not here; None: there is none, or nothing is missing."""
        own = self.pool.find_prefix(hashes[:depth])
        if len(own) == depth:
            return None
        self.pool.acquire(own)
        blocks = self.pool.allocate_landing(depth - len(own))
        if blocks is None:
            self.pool.release(own)
            return None
        return Landing(own, blocks)

    def landed(self, landing: Landing, job: PrefillJob) -> None:
        """The blocks are there, findable like computed ones, and the job takes its place in line."""
        job.landed_from = len(self.pool.find_prefix(job.request.hashes))
        self.pool.landed(landing.blocks)
        for depth, block in enumerate(landing.blocks, start=len(landing.own)):
            self.pool.register(block, job.request.hashes[depth])
        self.pool.release([*landing.own, *landing.blocks])
        self._fetching.discard(job.number)
        self._move_up()

    # -- telling ------------------------------------------------------------------------------------------------------

    def view(self) -> WorkerView:
        """What the worker's load report and this router's measurements say."""
        if self._view is None:
            ledger = self.pool.ledger()
            self._view = WorkerView(
                worker_id=self.worker_id,
                role=Role.PREFILL,
                fingerprint=LAYOUT,
                num_waiting=self._scheduler.num_waiting + len(self._line),
                num_running=self._scheduler.num_running,
                waiting_tokens=self._scheduler.waiting_tokens,
                free_blocks=ledger.free,
                cached_blocks=ledger.cached,
                total_blocks=ledger.total,
                prefill_tokens_per_s=self._fit.tokens_per_s,
                prefill_curve_s=self._fit.curve_s,
                max_num_seqs=self.profile.max_num_seqs,
            )
        return self._view

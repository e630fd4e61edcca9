"""A prefill worker under virtual time: the product's own PrefillScheduler and BlockPool, with a formula for each step.

As in the worker, commands take effect between two steps, and what changed is told at the end of one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

from tailrace.index.prefix_index import PrefixIndex
from tailrace.kv.block_pool import BlockPool
from tailrace.plan import StepOutput, StepPlan
from tailrace.policy.estimates import PrefillFit
from tailrace.policy.prefill_scheduler import PrefillScheduler
from tailrace.policy.prefix_fetches import PrefixFetch
from tailrace.policy.request import Request, StopRule
from tailrace.policy.routing import PrefixRange, WorkerView
from tailrace.sim.profile import HardwareProfile
from tailrace.sim.workload import MAX_TOKENS, SimRequest
from tailrace.types import Role, SamplingParams
from tailrace.worker.rates import FIT_FORGET, FIT_SPREAD

EPOCH = 1
LAYOUT = b"simulated"
SAMPLING = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
_STOP = StopRule(frozenset(), 2 * MAX_TOKENS)


@dataclass(frozen=True, slots=True)
class FetchedShare:
    """What came from one holder, and how long it took from asking on."""

    holder_id: str
    num_blocks: int
    seconds: float


@dataclass(slots=True, eq=False)
class PrefillJob:
    """One request on its way through a prefill worker."""

    number: int
    request: SimRequest
    decode_id: str
    sources: Sequence[PrefixRange] = ()
    """Who is to be asked for what of its prefix."""
    started_s: float | None = None
    # When its fetch is over.
    fetches: Sequence[FetchedShare] = ()
    fetch_tier: str = ""
    # When it is computed.
    hit_tokens: int = 0
    fetched_tokens: int = 0
    num_pulled_blocks: int = 0
    """Those that its decode worker can have pulled before the last step ended."""

    def end_fetch(self, fetch: PrefixFetch, shares: Sequence[FetchedShare], tier: str, block_tokens: int) -> None:
        self.fetches, self.fetch_tier = shares, tier
        self.fetched_tokens = (fetch.num_ready - fetch.num_local) * block_tokens


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
    fit: PrefillFit = field(default_factory=lambda: PrefillFit(FIT_FORGET, FIT_SPREAD))
    _step: _Step | None = None
    _inbox: list[Callable[[float], None]] = field(default_factory=list)
    """Commands that wait for the end of the step."""
    _view: WorkerView = field(init=False)

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.num_blocks, epoch=EPOCH)
        self._scheduler = PrefillScheduler(
            self.pool,
            block_size=self.block_tokens,
            max_num_seqs=self.profile.max_num_seqs,
            max_num_batched_tokens=self.profile.chunk_tokens,
            stop=_STOP,
        )
        self._view = self._seen()

    def accept(self, job: PrefillJob) -> None:
        request = job.request
        self._jobs[job.number] = job
        # Of the tokens the scheduler looks at their number only.
        tokens = cast("list[int]", range(request.num_prompt_tokens))
        hashes = list(request.full_hashes(self.block_tokens))
        # A source is said to hold all of the chain up to its last block.
        elsewhere = [range(source.first_block + source.num_blocks) for source in job.sources]
        asked = Request(job.number, tokens, request.num_prompt_tokens, SAMPLING, hashes=hashes)
        self._scheduler.submit(asked, elsewhere)

    def tell(self, command: Callable[[float], None], now_s: float) -> None:
        """At once, or when the step that runs is over."""
        if self._step is None:
            command(now_s)
        else:
            self._inbox.append(command)

    def drain_commands(self) -> list[Callable[[float], None]]:
        """Those that have waited for the step that is over now."""
        commands, self._inbox = self._inbox, []
        return commands

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
        self._step = None
        self.fit.add_step(((chunk.start, chunk.end) for chunk in step.plan.chunks), step.seconds)
        num_drawn = sum(len(chunk.choices) for chunk in step.plan.chunks)
        out = StepOutput(tokens=[0] * num_drawn, elapsed_s=step.seconds)
        done: list[PrefillJob] = []
        for progress in self._scheduler.finish(step.plan, out).progressed:
            job = self._jobs[progress.request.id]
            if not progress.is_computed:
                job.num_pulled_blocks = progress.num_ready
            else:
                del self._jobs[job.number]
                job.hit_tokens = progress.num_cached_tokens - job.fetched_tokens
                done.append(job)
        return done

    def report(self, index: PrefixIndex) -> None:
        """Says how busy it is and what changed in its cache, as a worker does after each step."""
        self._view = self._seen()
        if events := self.pool.drain_events():
            index.apply(self.worker_id, EPOCH, self.next_sequence, events)
            self.next_sequence += len(events)

    def give_back(self, job: PrefillJob) -> None:
        """The decode worker has pulled it."""
        self._scheduler.drop(job.number)

    # -- fetching -----------------------------------------------------------------------------------------------------

    def drain_granted(self) -> list[tuple[PrefillJob, PrefixFetch]]:
        """Requests whose prefix can be read now; each once, and ends with `end_fetch`."""
        return [(self._jobs[fetch.request.id], fetch) for fetch in self._scheduler.drain_granted()]

    def landed(self, fetch: PrefixFetch, blocks: Sequence[int]) -> None:
        self._scheduler.landed(fetch.request.id, blocks)

    def end_fetch(self, job: PrefillJob, fetch: PrefixFetch, shares: Sequence[FetchedShare], tier: str) -> None:
        """Nothing more comes: what has not is computed. `tier`: where most of it was."""
        job.end_fetch(fetch, shares, tier, self.block_tokens)
        self._scheduler.end_fetch(job.number)

    # -- telling ------------------------------------------------------------------------------------------------------

    def view(self) -> WorkerView:
        """What its last report said."""
        return self._view

    def _seen(self) -> WorkerView:
        ledger = self.pool.ledger()
        return WorkerView(
            worker_id=self.worker_id,
            role=Role.PREFILL,
            fingerprint=LAYOUT,
            num_waiting=self._scheduler.num_waiting,
            num_running=self._scheduler.num_running,
            waiting_tokens=self._scheduler.waiting_tokens,
            free_blocks=ledger.free,
            cached_blocks=ledger.cached,
            total_blocks=ledger.total,
            prefill_tokens_per_s=self.fit.tokens_per_s,
            prefill_curve_s=self.fit.curve_s,
            max_num_seqs=self.profile.max_num_seqs,
        )

"""The prefill worker as its engine thread sees it: commands in, one report a step out."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from tailrace.errors import InvalidRequestError, TailraceError
from tailrace.kv.block_pool import BlockPool, BlockState
from tailrace.kv.layout import KVLayout
from tailrace.messages import (
    ChoiceFinished,
    FirstToken,
    Holding,
    HoldingState,
    LegFailed,
    LegReport,
    LendDone,
    LentBlocks,
    Load,
)
from tailrace.plan import StepOutput, StepPlan
from tailrace.policy.estimates import PrefillFit
from tailrace.policy.offers import OfferPolicy
from tailrace.policy.prefill_scheduler import PrefillJob, PrefillScheduler
from tailrace.policy.request import Request, blocks_for
from tailrace.worker.holdings import pending_reads
from tailrace.worker.limits import MAX_WAITING, line_is_full, no_logits
from tailrace.worker.prefix_fetch import PulledPrefix, prefix_destination, tokens_by_tier
from tailrace.worker.rates import FIT_FORGET, FIT_SPREAD, Ewma
from tailrace.worker.report import LendProgress, StepReport, with_ledger
from tailrace.worker.runner import LaunchedStep, Runner

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Life:
    """A request from its acceptance on. From there to its end it is queued, fetching or being computed."""

    name: str
    accepted: float
    started: float = 0.0
    computed: float = 0.0
    cached_tokens: int = 0
    """When it started: whoever gives way finds what it computed itself."""
    num_found: int = 0
    """Leading blocks that were here then; what else was cached was fetched."""
    pulled: PulledPrefix = field(default_factory=PulledPrefix)

    @property
    def queue_s(self) -> float:
        """Before its first chunk, without the fetch of its prefix."""
        return max(0.0, self.started - self.accepted - self.pulled.seconds)

    @property
    def prefill_s(self) -> float:
        return self.computed - self.started


class PrefillWorker:
    """Engine thread only."""

    def __init__(
        self,
        runner: Runner,
        scheduler: PrefillScheduler,
        pool: BlockPool,
        layout: KVLayout,
        *,
        pool_address: int,
        offers: OfferPolicy | None = None,
    ) -> None:
        """`pool_address`: of the first byte of block 0; `offers`: None where there is no store."""
        self._runner = runner
        self._scheduler = scheduler
        self._pool = pool
        self._offers = offers
        self._block_size = layout.block_size
        self._block_bytes = layout.block_bytes
        self._pool_address = pool_address
        self._lives: dict[int, _Life] = {}
        self._fit = PrefillFit(FIT_FORGET, FIT_SPREAD)
        self._fetch_rate = Ewma()
        self._ended: list[int] = []
        self._failed: list[LegFailed] = []
        self._lends: list[LendProgress] = []

    # -- commands -----------------------------------------------------------------------------------------------------

    def submit(self, request: Request, name: str, elsewhere: Sequence[range] = ()) -> None:
        """A prompt that this pool can never hold, or one too many in line, is refused in the next report.

        `elsewhere`: blocks of its chain that others hold; a later report says where they are to be read into.
        """
        if (refusal := self._refusal(request)) is not None:
            self._failed.append(LegFailed(request.id, refusal))
            return
        self._lives[request.id] = _Life(name, time.monotonic())
        self._scheduler.submit(request, elsewhere)

    def _refusal(self, request: Request) -> TailraceError | None:
        if not self._scheduler.fits(len(request.tokens)):
            limit = self._pool.num_blocks * self._block_size
            return InvalidRequestError(f"{len(request.tokens)} tokens; the pool holds {limit}", param="token_ids")
        if self._scheduler.num_waiting >= MAX_WAITING:
            return line_is_full()
        return None

    def drop(self, request_id: int, in_flight: Sequence[int] = ()) -> None:
        """Cancelled, or pulled. Idempotent. Blocks `in_flight` may still be written; `settle` follows for them."""
        if self._lives.pop(request_id, None) is not None:
            if self._offers is not None and (job := self._scheduler.job(request_id)) is not None and job.is_computed:
                num_found = job.num_cached_tokens // self._block_size
                self._offers.note_over(job.request.hashes, job.request.tenant, num_found)
            self._scheduler.drop(request_id, in_flight)
            if in_flight:
                self._quarantine(in_flight)
            self._ended.append(request_id)

    def landed(self, request_id: int, blocks: Sequence[int]) -> None:
        """A read ended well."""
        self._scheduler.landed(request_id, blocks)

    def end_fetch(self, request_id: int, pulled: PulledPrefix, in_flight: Sequence[int]) -> None:
        """Nothing more of its prefix comes; blocks `in_flight` may still be written, and are quarantined."""
        if (life := self._lives.get(request_id)) is not None:
            life.pulled = pulled
        for fetch in pulled.fetches:
            if fetch.num_bytes:
                self._fetch_rate.add(fetch.num_bytes / max(fetch.seconds, 1e-6))
        self._scheduler.end_fetch(request_id, in_flight)
        if in_flight:
            self._quarantine(in_flight)

    def _quarantine(self, in_flight: Sequence[int]) -> None:
        self._scheduler.quarantine(in_flight)
        held = self._pool.ledger().quarantined
        log.warning("%d blocks are quarantined until late reads end, %d in all", len(in_flight), held)

    def settle(self, blocks: Sequence[int]) -> None:
        """A read ended into blocks that nobody waits for."""
        self._scheduler.settle(blocks)

    def tell_progress(self, request_id: int) -> None:
        """A needer came: the next report says all that is ready so far."""
        if (job := self._scheduler.job(request_id)) is not None:
            self._lends.append(self._progress(job))

    # -- steps --------------------------------------------------------------------------------------------------------

    def launch(self) -> LaunchedStep | None:
        plan = self._scheduler.schedule()
        if not plan.changes_anything:
            return None
        self._note_starts(plan)
        return LaunchedStep(plan, self._runner.launch(plan))

    def finish(self, step: LaunchedStep | None) -> StepReport:
        report = StepReport(lends=self._lends)
        self._lends = []
        if step is not None:
            self._book(step.plan, step.pending.wait(), report)
        report.ended, self._ended = self._ended, []
        if self._offers is not None:
            report.chains = self._offers.due()
        report.failed, self._failed = [*report.failed, *self._failed], []
        granted = self._scheduler.drain_granted()
        report.fetching = [prefix_destination(fetch, self._fit, self._block_size) for fetch in granted]
        report.kv_events = self._pool.drain_events()
        report.load = self.load()
        return report

    def _note_starts(self, plan: StepPlan) -> None:
        if plan.started:
            now = time.monotonic()
            for job in self._scheduler.jobs():
                life = self._lives[job.request.id]
                if not life.started:
                    life.started, life.cached_tokens, life.num_found = now, job.num_cached_tokens, job.num_found

    def _book(self, plan: StepPlan, out: StepOutput, report: StepReport) -> None:
        step = self._scheduler.finish(plan, out)
        self._fit.add_step(((chunk.start, chunk.end) for chunk in plan.chunks), out.elapsed_s)
        report.computed = not plan.is_empty
        if self._offers is not None:
            self._offers.pass_over(step.let_go)
        for job in step.progressed:
            if any(token.is_bad for token in job.first_tokens):
                report.failed.append(LegFailed(job.request.id, no_logits()))
                self.drop(job.request.id)
                continue
            report.lends.append(self._progress(job))
            if job.is_computed:
                self._report_done(job, report)

    def _report_done(self, job: PrefillJob, report: StepReport) -> None:
        request = job.request
        for token in job.first_tokens:
            report.tokens.add(request.id, token.choice, len(request.tokens), token.token_id, token.logprob)
            if token.finish_reason is not None:
                report.finished.append(ChoiceFinished(request.id, token.choice, token.finish_reason))
        life = self._lives[request.id]
        report.reports.append(
            LegReport(
                request.id,
                queue_s=life.queue_s,
                prefill_s=life.prefill_s,
                transfer_s=life.pulled.seconds,
                transfer_bytes=life.pulled.num_bytes,
                transport=life.pulled.transport,
                cached_tokens=life.cached_tokens,
                cached_by_tier=self._by_tier(life),
                fetches=life.pulled.fetches,
            )
        )

    def _by_tier(self, life: _Life) -> dict[str, int]:
        num_blocks = life.cached_tokens // self._block_size
        return tokens_by_tier(num_blocks, self._block_size, life.pulled.tiers, life.num_found)

    def _progress(self, job: PrefillJob) -> LendProgress:
        if job.is_computed:
            life = self._lives[job.request.id]
            life.computed = life.computed or time.monotonic()
        # Nothing of a table that is not whole: its prompt may give way, and who is told must not wait for that.
        is_whole = len(job.blocks) == blocks_for(len(job.request.tokens), self._block_size)
        blocks = job.blocks[job.num_gone : job.num_ready if is_whole else job.num_gone]
        addresses = [self._pool_address + block * self._block_bytes for block in blocks]
        lent = LentBlocks(job.num_gone, blocks, addresses, [self._pool.generation(b) for b in blocks])
        return LendProgress(job.request.id, lent, self._done(job) if job.is_computed and job.first_tokens else None)

    def _done(self, job: PrefillJob) -> LendDone:
        life = self._lives[job.request.id]
        return LendDone(
            first_tokens=tuple(FirstToken(t.choice, t.token_id, t.logprob, t.finish_reason) for t in job.first_tokens),
            last_block_tokens=len(job.request.tokens) - (len(job.blocks) - 1) * self._block_size,
            cached_tokens=life.cached_tokens,
            queue_s=life.queue_s,
            prefill_s=life.prefill_s,
        )

    # -- books --------------------------------------------------------------------------------------------------------

    def load(self) -> Load:
        load = Load(
            num_waiting=self._scheduler.num_waiting,
            num_running=self._scheduler.num_running,
            waiting_tokens=self._scheduler.waiting_tokens,
            prefill_tokens_per_s=self._fit.tokens_per_s,
            prefill_curve_s=self._fit.curve_s,
            transfer_bytes_per_s=self._fetch_rate.value,
        )
        return with_ledger(load, self._pool.ledger())

    def holdings(self) -> list[Holding]:
        """Who holds what, and why. What is still read into for a request that is gone is held by "a pending read"."""
        held = []
        for job in self._scheduler.jobs():
            is_lent = any(self._pool.state(block) is BlockState.LENT for block in job.held[:1])
            state = HoldingState.LENT if is_lent else HoldingState.ACTIVE
            held.append(self._holding(job.request.id, state, job.held))
        landing: set[int] = set()
        for fetch in self._scheduler.fetching():
            arriving = [block for block in fetch.held if self._pool.state(block) is BlockState.LANDING]
            landing.update(arriving)
            active = [block for block in fetch.held if block not in arriving]
            for state, blocks in ((HoldingState.LANDING, arriving), (HoldingState.ACTIVE, active)):
                if blocks:
                    held.append(self._holding(fetch.request.id, state, blocks))
        return [*held, *pending_reads(self._pool, landing)]

    def _holding(self, request_id: int, state: HoldingState, blocks: Sequence[int]) -> Holding:
        life = self._lives[request_id]
        return Holding(life.name, state, tuple(blocks), time.monotonic() - life.accepted)

    def check_integrity(self) -> None:
        self._pool.check_integrity()

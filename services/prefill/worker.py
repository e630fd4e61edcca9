"""The prefill worker as its engine thread sees it: commands in, one report a step out."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

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
from tailrace.policy.prefill_scheduler import PrefillJob, PrefillScheduler
from tailrace.policy.request import Request
from tailrace.worker.limits import MAX_WAITING, line_is_full, no_logits
from tailrace.worker.rates import Ewma
from tailrace.worker.report import LendProgress, StepReport, with_ledger
from tailrace.worker.runner import LaunchedStep, Runner


@dataclass(slots=True)
class _Times:
    accepted: float
    started: float = 0.0
    computed: float = 0.0


class PrefillWorker:
    """Engine thread only."""

    def __init__(
        self, runner: Runner, scheduler: PrefillScheduler, pool: BlockPool, layout: KVLayout, *, pool_address: int
    ) -> None:
        """`pool_address`: of the first byte of block 0."""
        self._runner = runner
        self._scheduler = scheduler
        self._pool = pool
        self._block_size = layout.block_size
        self._block_bytes = layout.block_bytes
        self._pool_address = pool_address
        self._times: dict[int, _Times] = {}
        self._names: dict[int, str] = {}
        self._rate = Ewma()
        self._ended: list[int] = []
        self._chains: list[Sequence[bytes]] = []
        self._failed: list[LegFailed] = []
        self._lends: list[LendProgress] = []

    # -- commands -----------------------------------------------------------------------------------------------------

    def submit(self, request: Request, name: str) -> None:
        """A prompt that this pool can never hold, or one too many in line, is refused in the next report."""
        if (refusal := self._refusal(request)) is not None:
            self._failed.append(LegFailed(request.id, refusal))
            return
        self._times[request.id] = _Times(time.monotonic())
        self._names[request.id] = name
        self._scheduler.submit(request)

    def _refusal(self, request: Request) -> TailraceError | None:
        if not self._scheduler.fits(len(request.tokens)):
            limit = self._pool.num_blocks * self._block_size
            return InvalidRequestError(f"{len(request.tokens)} tokens; the pool holds {limit}", param="token_ids")
        if self._scheduler.num_waiting >= MAX_WAITING:
            return line_is_full()
        return None

    def drop(self, request_id: int) -> None:
        """Cancelled, or pulled. Idempotent."""
        if self._times.pop(request_id, None) is not None:
            del self._names[request_id]
            if (job := self._scheduler.job(request_id)) is not None and job.is_computed:
                self._chains.append(job.request.hashes)
            self._scheduler.drop(request_id)
            self._ended.append(request_id)

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
        report.chains, self._chains = self._chains, []
        report.failed, self._failed = [*report.failed, *self._failed], []
        report.kv_events = self._pool.drain_events()
        report.load = self.load()
        return report

    def _note_starts(self, plan: StepPlan) -> None:
        if plan.started:
            now = time.monotonic()
            for job in self._scheduler.jobs():
                times = self._times[job.request.id]
                times.started = times.started or now

    def _book(self, plan: StepPlan, out: StepOutput, report: StepReport) -> None:
        step = self._scheduler.finish(plan, out)
        if step.computed_tokens and out.elapsed_s > 0:
            self._rate.add(step.computed_tokens / out.elapsed_s)
        report.computed = not plan.is_empty
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
        times = self._times[request.id]
        report.reports.append(
            LegReport(
                request.id,
                queue_s=times.started - times.accepted,
                prefill_s=times.computed - times.started,
                cached_tokens=job.num_cached_tokens,
                cached_by_tier={"worker": job.num_cached_tokens} if job.num_cached_tokens else {},
            )
        )

    def _progress(self, job: PrefillJob) -> LendProgress:
        if job.is_computed:
            times = self._times[job.request.id]
            times.computed = times.computed or time.monotonic()
        blocks = job.blocks[: job.num_ready]
        addresses = [self._pool_address + block * self._block_bytes for block in blocks]
        lent = LentBlocks(0, blocks, addresses, [self._pool.generation(b) for b in blocks])
        return LendProgress(job.request.id, lent, self._done(job) if job.is_computed and job.first_tokens else None)

    def _done(self, job: PrefillJob) -> LendDone:
        times = self._times[job.request.id]
        return LendDone(
            first_tokens=tuple(FirstToken(t.choice, t.token_id, t.logprob, t.finish_reason) for t in job.first_tokens),
            last_block_tokens=len(job.request.tokens) - (len(job.blocks) - 1) * self._block_size,
            cached_tokens=job.num_cached_tokens,
            queue_s=times.started - times.accepted,
            prefill_s=times.computed - times.started,
        )

    # -- books --------------------------------------------------------------------------------------------------------

    def load(self) -> Load:
        load = Load(
            num_waiting=self._scheduler.num_waiting,
            num_running=self._scheduler.num_running,
            waiting_tokens=self._scheduler.waiting_tokens,
            prefill_tokens_per_s=self._rate.value,
        )
        return with_ledger(load, self._pool.ledger())

    def holdings(self) -> list[Holding]:
        """Who holds what, and why."""
        now = time.monotonic()
        return [
            Holding(
                self._names[job.request.id],
                HoldingState.LENT if self._pool.state(job.blocks[0]) is BlockState.LENT else HoldingState.ACTIVE,
                tuple(job.blocks),
                now - self._times[job.request.id].accepted,
            )
            for job in self._scheduler.jobs()
        ]

    def check_integrity(self) -> None:
        self._pool.check_integrity()

"""The decode worker as its engine thread sees it: commands in, one report a step out."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tailrace.errors import InvalidRequestError, OverloadedError, TailraceError
from tailrace.kv.block_pool import BlockPool, BlockState
from tailrace.messages import ChoiceFinished, Fetch, FirstToken, Holding, HoldingState, LegFailed, LegReport, Load
from tailrace.plan import StepOutput, StepPlan
from tailrace.policy.decode_scheduler import DecodeScheduler
from tailrace.policy.estimates import PrefillFit, StepFit
from tailrace.policy.offers import OfferPolicy
from tailrace.policy.request import DrawnToken, Request
from tailrace.policy.sequence import DecodeStep
from tailrace.policy.swap import SwapCost
from tailrace.worker.holdings import pending_reads
from tailrace.worker.limits import MAX_WAITING, line_is_full, no_logits
from tailrace.worker.prefix_fetch import PulledPrefix, prefix_destination, tokens_by_tier
from tailrace.worker.rates import FIT_FORGET, FIT_SPREAD, Ewma
from tailrace.worker.report import Destination, PrefixDestination, StepReport, with_ledger
from tailrace.worker.runner import LaunchedStep, Runner

log = logging.getLogger(__name__)

QUARANTINE_IS_FULL = "too many blocks wait for reads that stall; this worker pulls nothing until they end"
MAX_QUARANTINED_SHARE = 0.25
"""Of the pool."""


@dataclass(slots=True)
class Pull:
    """What the transfer of a request's prompt took."""

    seconds: float
    """Spent in reads; they overlap with the prefill that still goes on."""
    num_bytes: int
    transport: str


@dataclass(slots=True, eq=False)
class _Life:
    """A request from its acceptance to the end of its last choice."""

    name: str
    open_choices: set[int]
    accepted: float
    cached_tokens: int = 0
    started: float = 0.0
    first_local: float = 0.0
    joined: float = 0.0
    pull: Pull | None = None
    pulled: PulledPrefix = field(default_factory=PulledPrefix)
    """Of its prompt's prefix, where that is computed here."""
    num_found: int = 0
    """Leading blocks of it that were here before that."""
    fetches: tuple[Fetch, ...] = ()
    """All of them, also those of blocks that it had lost here."""


class DecodeWorker:
    """Engine thread only."""

    def __init__(
        self,
        runner: Runner,
        scheduler: DecodeScheduler,
        pool: BlockPool,
        *,
        block_bytes: int,
        block_tokens: int,
        offers: OfferPolicy | None = None,
        swap_cost: SwapCost | None = None,
    ) -> None:
        """`offers` and `swap_cost`: the scheduler's own; None where there is no store."""
        self.block_bytes = block_bytes
        self._block_tokens = block_tokens
        self._runner = runner
        self._scheduler = scheduler
        self._pool = pool
        self._offers = offers
        self._swap_cost = swap_cost
        self._lives: dict[int, _Life] = {}
        self._step_s = Ewma()
        self._step_fit = StepFit(FIT_FORGET, FIT_SPREAD)
        self._prefill_fit = PrefillFit(FIT_FORGET, FIT_SPREAD)
        if swap_cost is not None:
            swap_cost.prefill_s = self._prefill_fit.seconds
        self._pull_rate = Ewma()
        self._report = StepReport()
        """What commands left to say before the next step."""

    # -- commands -----------------------------------------------------------------------------------------------------

    def submit_local(self, request: Request, name: str, elsewhere: Sequence[range] = ()) -> None:
        """Prefill here. A prompt that cannot be held, or one too many in line, is refused in the next report.

        `elsewhere`: blocks of its chain that others hold; a later report says where they are to be read into.
        """
        if self._admit(request, name):
            self._scheduler.submit_local(request, elsewhere)

    def book(self, request: Request, name: str) -> bool:
        """Promise room for a prompt whose KV will be pulled. False: refused, and said so in the next report."""
        if self._pool.ledger().quarantined > MAX_QUARANTINED_SHARE * self._pool.num_blocks:
            self._refuse(request.id, OverloadedError(QUARANTINE_IS_FULL, retry_after_s=1.0))
            return False
        if not self._admit(request, name):
            return False
        if self._scheduler.book(request):
            return True
        del self._lives[request.id]
        free = self._pool.num_available
        self._refuse(request.id, OverloadedError(f"{free} blocks free, all of them booked", retry_after_s=0.5))
        return False

    def _admit(self, request: Request, name: str) -> bool:
        refusal = self._refusal(request)
        if refusal is not None:
            self._refuse(request.id, refusal)
            return False
        self._lives[request.id] = _Life(name, set(request.choices), time.monotonic())
        return True

    def _refusal(self, request: Request) -> TailraceError | None:
        if not self._scheduler.fits(len(request.tokens)):
            blocks = self._pool.num_blocks
            return InvalidRequestError(
                f"{len(request.tokens)} tokens do not fit the pool of {blocks} blocks", param="token_ids"
            )
        if self._scheduler.num_waiting >= MAX_WAITING:
            return line_is_full()
        return None

    def _refuse(self, request_id: int, error: TailraceError) -> None:
        self._report.failed.append(LegFailed(request_id, error))

    def want_destination(self, request_id: int) -> None:
        """Its owner has blocks ready; a later report grants the destination."""
        self._scheduler.want_destination(request_id)

    def first_handed_over(self, request: Request) -> int:
        """The first block of its prompt that is pulled. From any thread."""
        return self._scheduler.first_handed_over(len(request.tokens))

    def landed(self, request_id: int, blocks: Sequence[int]) -> None:
        """A read ended well."""
        self._scheduler.landed(request_id, blocks)

    def settle(self, blocks: Sequence[int]) -> None:
        """A read ended into blocks that nobody waits for."""
        self._scheduler.settle(blocks)

    def quarantine(self, blocks: Sequence[int]) -> None:
        """A read into these blocks stalls."""
        self._scheduler.quarantine(blocks)
        held = self._pool.ledger().quarantined
        log.error(
            "%d blocks are quarantined, %d of %d in all: a peer's read neither ends nor fails; "
            "past %d%% this worker pulls nothing more until they end or it is restarted",
            len(blocks),
            held,
            self._pool.num_blocks,
            round(MAX_QUARANTINED_SHARE * 100),
        )

    def join(self, request_id: int, first: Sequence[FirstToken], pull: Pull) -> None:
        """Every block has landed."""
        if (life := self._lives.get(request_id)) is None:
            self._scheduler.drop(request_id)
            return
        life.pull, life.joined = pull, time.monotonic()
        if pull.num_bytes:
            self._pull_rate.add(pull.num_bytes / max(pull.seconds, 1e-6))
        drawn = [DrawnToken(t.choice, t.token_id, t.logprob, t.finish_reason) for t in first]
        self._tell(self._scheduler.join(request_id, drawn), self._report)

    def recompute(self, request_id: int, in_flight: Sequence[int]) -> None:
        """The pull failed: prefill here. Blocks `in_flight` may still be written; `settle` follows for them."""
        self._scheduler.recompute(request_id, in_flight)

    def drop(self, request_id: int, choices: Sequence[int] = (), in_flight: Sequence[int] = ()) -> None:
        """Cancelled: some choices, or all. Idempotent."""
        # Also when its last choice was dropped before: its arrival still waits for reads, and holds their blocks.
        self._scheduler.drop(request_id, choices, in_flight)
        if (life := self._lives.get(request_id)) is None:
            return
        life.open_choices.difference_update(choices or tuple(life.open_choices))
        self._end_if_over(request_id, self._report)

    # -- blocks that are fetched for what is computed here -------------------------------------------------------------

    def swap_landed(self, swap_id: int, blocks: Sequence[int]) -> None:
        """A read ended well."""
        self._scheduler.swaps.landed(swap_id, blocks)

    def end_swap(self, swap_id: int, pulled: PulledPrefix, in_flight: Sequence[int]) -> None:
        """Nothing more comes of it; blocks `in_flight` may still be written: `settle` follows for them."""
        swaps = self._scheduler.swaps
        prompt_of = swaps.prompt_of(swap_id)
        if self._swap_cost is not None and prompt_of is None:
            self._swap_cost.note(len(pulled.tiers), sum(fetch.seconds for fetch in pulled.fetches))
        request_id, num_found = swaps.request_of(swap_id), swaps.num_found(swap_id)
        is_in_line = self._scheduler.end_swap(swap_id, in_flight)
        if (life := self._lives.get(request_id)) is not None:
            life.fetches += pulled.fetches
            if prompt_of is not None:
                life.pulled = pulled
                # Whoever is in line again starts with blocks that are here, and with none that others made needless.
                life.num_found = min(pulled.tiers, default=0) if is_in_line else num_found
        if in_flight:
            self.quarantine(in_flight)

    # -- steps --------------------------------------------------------------------------------------------------------

    def launch(self) -> LaunchedStep | None:
        plan = self._scheduler.schedule()
        if not plan.changes_anything:
            return None
        self._note_local_starts(plan)
        return LaunchedStep(plan, self._runner.launch(plan))

    def finish(self, step: LaunchedStep | None) -> StepReport:
        report, self._report = self._report, StepReport()
        if step is not None:
            self._book(step.plan, step.pending.wait(), report)
        for arrival in self._scheduler.grant():
            report.granted.append(Destination(arrival.request.id, tuple(arrival.blocks), arrival.num_local))
        if self._offers is not None:
            report.chains = self._offers.due()
        report.fetching = self._destinations()
        report.kv_events = self._pool.drain_events()
        report.load = self.load()
        return report

    def _destinations(self) -> list[PrefixDestination]:
        """Of the fetches that may begin."""
        swaps = self._scheduler.swaps
        return [
            replace(
                prefix_destination(fetch, self._prefill_fit, self._block_tokens),
                prompt_of=swaps.prompt_of(fetch.request.id),
            )
            for fetch in swaps.drain_granted()
        ]

    def _book(self, plan: StepPlan, out: StepOutput, report: StepReport) -> None:
        report.computed = not plan.is_empty
        if plan.decode and not plan.chunks:
            self._step_s.add(out.elapsed_s)
            self._step_fit.add(len(plan.decode), out.elapsed_s)
        elif plan.chunks and not plan.decode:
            self._prefill_fit.add_step(((chunk.start, chunk.end) for chunk in plan.chunks), out.elapsed_s)
        self._tell(self._scheduler.finish(plan, out), report)

    def _note_local_starts(self, plan: StepPlan) -> None:
        """A request's first local chunk: its queueing ends, and what was found cached is known."""
        now = time.monotonic()
        for chunk, request_id in zip(plan.chunks, self._scheduler.prefilling(), strict=True):
            life = self._lives[request_id]
            if not life.started and not life.joined:
                life.started, life.cached_tokens = now, chunk.start

    def _tell(self, step: DecodeStep, report: StepReport) -> None:
        report.tokens.extend(step.tokens)
        for request_id in step.bad:
            # Several of its choices may be bad.
            if request_id in self._lives:
                self._fail(request_id, report)
        now = time.monotonic()
        for request_id in step.prefilled:
            if (life := self._lives.get(request_id)) is not None:
                life.first_local = life.first_local or now
        for finish in step.finished:
            if (life := self._lives.get(finish.key.handle)) is not None:
                report.finished.append(ChoiceFinished(finish.key.handle, finish.key.choice, finish.reason))
                life.open_choices.discard(finish.key.choice)
                self._end_if_over(finish.key.handle, report)

    def _fail(self, request_id: int, report: StepReport) -> None:
        self._scheduler.drop(request_id)
        del self._lives[request_id]
        report.failed.append(LegFailed(request_id, no_logits()))

    def _end_if_over(self, request_id: int, report: StepReport) -> None:
        life = self._lives[request_id]
        if life.open_choices:
            return
        report.reports.append(self._leg_report(request_id, life, time.monotonic()))
        report.ended.append(request_id)
        del self._lives[request_id]

    def _leg_report(self, request_id: int, life: _Life, now: float) -> LegReport:
        """Who joined was prefilled elsewhere; else queue, prefill and cached tokens are this worker's own."""
        began = life.joined or life.first_local or now
        if life.joined or not life.started:
            pull = life.pull or Pull(0.0, 0, "")
            return LegReport(
                request_id,
                transfer_s=pull.seconds,
                transfer_bytes=pull.num_bytes,
                transport=pull.transport,
                decode_s=now - began,
                fetches=life.fetches,
            )
        pulled = life.pulled
        return LegReport(
            request_id,
            queue_s=max(0.0, life.started - life.accepted - pulled.seconds),
            prefill_s=began - life.started,
            transfer_s=pulled.seconds,
            transfer_bytes=pulled.num_bytes,
            transport=pulled.transport,
            decode_s=now - began,
            cached_tokens=life.cached_tokens,
            cached_by_tier=tokens_by_tier(
                life.cached_tokens // self._block_tokens, self._block_tokens, pulled.tiers, life.num_found
            ),
            fetches=life.fetches,
        )

    # -- books --------------------------------------------------------------------------------------------------------

    def load(self) -> Load:
        load = Load(
            num_waiting=self._scheduler.num_waiting,
            num_running=self._scheduler.num_running,
            waiting_tokens=self._scheduler.waiting_tokens,
            booked_blocks=self._scheduler.booked_blocks,
            prefill_tokens_per_s=self._prefill_fit.tokens_per_s,
            prefill_curve_s=self._prefill_fit.curve_s,
            decode_step_s=self._step_s.value,
            decode_base_s=self._step_fit.base_s,
            decode_row_s=self._step_fit.row_s,
            transfer_bytes_per_s=self._pull_rate.value,
        )
        return with_ledger(load, self._pool.ledger())

    def holdings(self) -> list[Holding]:
        """Who holds what, and why. What is still read into for a request that is gone is held by "a pending read"."""
        now = time.monotonic()
        held = [
            Holding(self._name(s.request.id), HoldingState.ACTIVE, tuple(s.held), self._age(s.request.id, now))
            for s in self._scheduler.sequences()
        ]
        named: set[int] = set()
        for arrival in self._scheduler.arrivals():
            landing = tuple(b for b in arrival.held if self._pool.state(b) is BlockState.LANDING)
            named.update(landing)
            if landing:
                request_id = arrival.request.id
                held.append(Holding(self._name(request_id), HoldingState.LANDING, landing, self._age(request_id, now)))
        for sequence, fetch in self._scheduler.swaps.held():
            landing = tuple(b for b in fetch.held if self._pool.state(b) is BlockState.LANDING)
            named.update(landing)
            request_id = sequence.request.id if sequence is not None else -1
            name = self._name(request_id) if sequence is not None else "a fetch that nobody waits for"
            rest = tuple(b for b in fetch.held if b not in landing)
            held.append(Holding(name, HoldingState.ACTIVE, rest, self._age(request_id, now)))
            held.append(Holding(name, HoldingState.LANDING, landing, self._age(request_id, now)))
        return [*held, *pending_reads(self._pool, named)]

    def _name(self, request_id: int) -> str:
        return self._lives[request_id].name if request_id in self._lives else f"#{request_id}"

    def _age(self, request_id: int, now: float) -> float:
        return now - self._lives[request_id].accepted if request_id in self._lives else 0.0

    def check_integrity(self) -> None:
        self._pool.check_integrity()

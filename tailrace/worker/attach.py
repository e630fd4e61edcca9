"""The gateways attached to this worker, and the legs that each of them submitted.

A session is a gateway's `Attach` stream. While it is open its legs live; when it closes, for whatever reason, they are
cancelled. What the engine says is coalesced for each session until the stream takes it: the engine never waits for a
gateway.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from tailrace.errors import DeadlineExceededError, InvalidRequestError, TailraceError, UnavailableError
from tailrace.kv.events import KVEvent, KVEvents
from tailrace.messages import (
    ChoiceFinished,
    KvEventBatch,
    LegFailed,
    LegReport,
    LinkCount,
    Load,
    OwnerRate,
    StepEvents,
    Submission,
    TokenColumns,
    WorkerInfo,
)
from tailrace.worker.report import StepReport

log = logging.getLogger(__name__)

BEAT_S = 1.0
"""A session hears from us at least this often."""
LOAD_S = 0.1
"""A session learns the load at most this often while there are steps to tell of."""


@dataclass(slots=True, eq=False)
class Leg:
    """A submission that this worker accepted. `id` is the worker's own name for it."""

    id: int
    session: "Session"
    submission: Submission
    accepted_at: float
    deadline: asyncio.TimerHandle | None = None

    @property
    def name(self) -> str:
        return f"{self.submission.request_id}/{self.submission.attempt}"


class LegHandler(Protocol):
    """What a role does with legs. Called on the event loop; must not block."""

    def begin(self, leg: Leg) -> None:
        """Raises TailraceError to refuse."""
        ...

    def cancel(self, leg: Leg, choices: tuple[int, ...]) -> None:
        """`choices` empty: the whole leg, which is forgotten here already."""
        ...


@dataclass(slots=True, eq=False)
class Session:
    """One gateway's stream."""

    gateway_id: str
    gateway_epoch: int
    info: WorkerInfo
    steps: Callable[[], int]
    load: Callable[[], Load]
    legs: dict[int, Leg] = field(default_factory=dict)
    """By the gateway's handle."""
    _pending: StepEvents = field(default_factory=StepEvents)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _is_closed: bool = False
    _load_sent_at: float = 0.0
    _owners_told: tuple[OwnerRate, ...] | None = None

    def close(self) -> None:
        """End the stream after what is pending. Idempotent."""
        self._is_closed = True
        self._news.set()

    async def events(self) -> AsyncGenerator[StepEvents, None]:
        """First who we are, then one message a step or more rarely, and a beat when there is nothing to say."""
        yield self._stamped(StepEvents(info=self.info, load=self.load()))
        is_last = False
        while not is_last:
            await self._wait_for_news()
            is_last = self._is_closed
            pending, self._pending = self._pending, StepEvents()
            self._news.clear()
            yield self._stamped(pending)

    async def _wait_for_news(self) -> None:
        try:
            async with asyncio.timeout(BEAT_S):
                await self._news.wait()
        except TimeoutError:
            pass

    def _stamped(self, events: StepEvents) -> StepEvents:
        events.epoch, events.step = self.info.epoch, self.steps()
        now = time.monotonic()
        if events.load is None and now - self._load_sent_at >= LOAD_S:
            events.load, self._load_sent_at = self.load(), now
        if events.load is not None and events.load.owners is not None:
            if events.load.owners is self._owners_told:
                events.load = replace(events.load, owners=None)
            else:
                self._owners_told = events.load.owners
        return events

    def add_token(self, columns: TokenColumns, row: int, handle: int) -> None:
        logprob = columns.logprobs[row] if columns.logprobs is not None else None
        self._pending.tokens.add(handle, columns.choices[row], columns.positions[row], columns.token_ids[row], logprob)
        self._news.set()

    def add_finished(self, finish: ChoiceFinished) -> None:
        self._pending.finished.append(finish)
        self._news.set()

    def add_failure(self, handle: int, error: TailraceError) -> None:
        self._pending.failed.append(LegFailed(handle, error))
        self._news.set()

    def add_report(self, report: LegReport) -> None:
        self._pending.reports.append(report)
        self._news.set()

    def add_kv_events(self, batch: KvEventBatch) -> None:
        if (waiting := self._pending.kv_events) is not None:
            batch = KvEventBatch(waiting.epoch, waiting.first_sequence, waiting.events + batch.events)
        self._pending.kv_events = batch
        self._news.set()


class Attachments:
    """All sessions and legs of a worker. Event loop only."""

    def __init__(
        self,
        info: WorkerInfo,
        handler: LegHandler,
        *,
        steps: Callable[[], int],
        owners: Callable[[], tuple[OwnerRate, ...] | None] = lambda: None,
        links: Callable[[], tuple[LinkCount, ...]] = tuple,
    ) -> None:
        """`owners`: at which it reads from others; the same tuple until something has changed. `links`: over what."""
        self.info = info
        self._handler = handler
        self._steps = steps
        self._owners = owners
        self._links = links
        self._sessions: dict[str, Session] = {}
        self._legs: dict[int, Leg] = {}
        self._ids = itertools.count(1)
        self._load = Load()
        self._kv_sequence = 0
        self.is_draining = False
        self.on_kv_events: Callable[[KvEventBatch], None] = lambda batch: None
        """Hears of every batch, beside the sessions."""

    @property
    def num_legs(self) -> int:
        return len(self._legs)

    @property
    def load(self) -> Load:
        """As of the last step; whether it drains and what it reads others over, as of now."""
        return replace(self._load, draining=self.is_draining, owners=self._owners(), links=self._links())

    @property
    def kv_sequence(self) -> int:
        """Number of the next KV event."""
        return self._kv_sequence

    def leg(self, leg_id: int) -> Leg | None:
        return self._legs.get(leg_id)

    # -- what gateways do ---------------------------------------------------------------------------------------------

    def open(self, gateway_id: str, gateway_epoch: int) -> Session:
        """A new stream of a gateway fences its old one."""
        if (old := self._sessions.get(gateway_id)) is not None:
            log.info("gateway %s attached again; its old stream is closed", gateway_id)
            self.close(old)
        session = Session(gateway_id, gateway_epoch, self.info, self._steps, lambda: self.load)
        self._sessions[gateway_id] = session
        log.info("gateway %s attached", gateway_id)
        return session

    def close(self, session: Session) -> None:
        """Cancels everything that came over it. Idempotent."""
        session.close()
        if self._sessions.get(session.gateway_id) is session:
            del self._sessions[session.gateway_id]
            log.info("gateway %s detached; %d legs cancelled", session.gateway_id, len(session.legs))
        for leg in list(session.legs.values()):
            self._cancel(leg)

    def submit(self, session: Session, submission: Submission) -> None:
        """A refusal is an event on the session, never an exception."""
        if (refusal := self._refusal(session, submission)) is not None:
            session.add_failure(submission.handle, refusal)
            return
        leg = Leg(next(self._ids), session, submission, time.monotonic())
        self._enter(leg)
        try:
            self._handler.begin(leg)
        except TailraceError as error:
            self.fail(leg.id, error)

    def _refusal(self, session: Session, submission: Submission) -> TailraceError | None:
        if submission.handle in session.legs:
            return InvalidRequestError(f"handle {submission.handle} is in use", param="handle")
        if self.is_draining:
            return UnavailableError(f"worker {self.info.worker_id} is draining", retry_after_s=1.0)
        longest = self.info.max_model_len - 1
        if len(submission.tokens) > longest:
            return InvalidRequestError(f"{len(submission.tokens)} tokens; at most {longest} fit", param="token_ids")
        return None

    def _enter(self, leg: Leg) -> None:
        leg.session.legs[leg.submission.handle] = leg
        self._legs[leg.id] = leg
        loop = asyncio.get_running_loop()
        leg.deadline = loop.call_later(max(0.0, leg.submission.deadline_s), self._expire, leg)

    def cancel(self, session: Session, handle: int, choices: tuple[int, ...]) -> None:
        """Unknown handles are fine: the leg may just have ended."""
        if (leg := session.legs.get(handle)) is None:
            return
        if choices:
            self._handler.cancel(leg, choices)
        else:
            self._cancel(leg)

    def _expire(self, leg: Leg) -> None:
        spent = time.monotonic() - leg.accepted_at
        leg.session.add_failure(
            leg.submission.handle, DeadlineExceededError(f"not done within its deadline ({spent:.1f} s)")
        )
        self._cancel(leg)

    def _cancel(self, leg: Leg) -> None:
        self.end(leg.id)
        self._handler.cancel(leg, ())

    # -- what the worker does -----------------------------------------------------------------------------------------

    def end(self, leg_id: int) -> None:
        """The leg is over; its handle is forgotten. Idempotent."""
        if (leg := self._legs.pop(leg_id, None)) is None:
            return
        leg.session.legs.pop(leg.submission.handle, None)
        if leg.deadline is not None:
            leg.deadline.cancel()

    def fail(self, leg_id: int, error: TailraceError) -> None:
        """One terminal error to its gateway, then forgotten."""
        if (leg := self._legs.get(leg_id)) is not None:
            leg.session.add_failure(leg.submission.handle, error)
            self.end(leg_id)

    def deliver(self, report: StepReport) -> None:
        """Spread what a step said over the sessions it concerns."""
        self._load = report.load
        self._deliver_tokens(report.tokens)
        for finish in report.finished:
            if (leg := self._legs.get(finish.handle)) is not None:
                leg.session.add_finished(replace(finish, handle=leg.submission.handle))
        for leg_report in report.reports:
            if (leg := self._legs.get(leg_report.handle)) is not None:
                leg.session.add_report(replace(leg_report, handle=leg.submission.handle))
        for failure in report.failed:
            self.fail(failure.handle, failure.error)
        for leg_id in report.ended:
            self.end(leg_id)
        self._deliver_kv_events(report.kv_events)

    def _deliver_tokens(self, columns: TokenColumns) -> None:
        for row, leg_id in enumerate(columns.handles):
            if (leg := self._legs.get(leg_id)) is not None:
                leg.session.add_token(columns, row, leg.submission.handle)

    def _deliver_kv_events(self, events: Sequence[KVEvent]) -> None:
        if not events:
            return
        batch = KvEventBatch(self.info.epoch, self._kv_sequence, KVEvents.of(events))
        self._kv_sequence += len(events)
        for session in self._sessions.values():
            session.add_kv_events(batch)
        self.on_kv_events(batch)

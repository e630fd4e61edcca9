"""The workers of this gateway: who is attached, how busy each is, and what each of them says.

A member is an address that the gateway keeps an `Attach` stream to: named in the configuration for good, or for as long
as the worker keeps its `Join` stream open. When the stream breaks, every leg on it fails at once; the address is tried
again.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from services.gateway.outlet import Board, Outlet, StepWriter
from services.gateway.watch import Silence, WorkWatch
from tailrace.errors import InternalError, LayoutMismatchError, TailraceError, WorkerLostError
from tailrace.index.feeds import Feed, Feeds, Holder, Source
from tailrace.index.prefix_index import PrefixIndex
from tailrace.messages import (
    ChoiceFinished,
    LedgerReport,
    LegReport,
    Load,
    OwnerRate,
    StepEvents,
    Submission,
    TokenColumns,
    WorkerInfo,
)
from tailrace.policy.other_routers import InFlight
from tailrace.policy.pairs import NO_PAIRS, PairRates
from tailrace.policy.routing import WorkerView
from tailrace.rpc.client import AttachCall, Peer
from tailrace.rpc.options import PEER_LOSS_S
from tailrace.types import FinishReason, Role, TokenLogprob

log = logging.getLogger(__name__)

REATTACH_S = 0.3
RESERVATION_S = 0.25
"""How long a submission counts beside a worker's load report, until a report that surely knows it has come."""


class LegSink(Protocol):
    """Who submitted a leg, and hears of it."""

    def on_tokens(self, choice: int, position: int, ids: list[int], logprobs: list[TokenLogprob] | None) -> None: ...

    def on_report(self, report: LegReport) -> None: ...

    def on_finished(self, choice: int, reason: FinishReason) -> None: ...

    def on_failed(self, error: TailraceError) -> None: ...


@dataclass(slots=True, eq=False)
class Member:
    """One attached worker."""

    info: WorkerInfo
    call: AttachCall
    peer: Peer
    feed: Feed
    load: Load = field(default_factory=Load)
    is_lost: bool = False
    """Its stream takes nothing more; that it has ended will be noticed in a moment."""
    sinks: dict[int, LegSink] = field(default_factory=dict)
    board: Board | None = None
    """The short way of some of the sinks, by the same handle."""
    fingerprint: bytes = field(init=False)
    _reserved: dict[int, tuple[float, int, int]] = field(default_factory=dict)
    """By handle: when, tokens, sequences."""
    _uncomputed: dict[int, Callable[[], None]] = field(default_factory=dict)
    """By handle: whom to tell once its prompt is computed, or the leg is over."""
    _pairs: PairRates = NO_PAIRS
    _view: WorkerView | None = None
    """Until something in it changes: every request looks at every worker."""

    def __post_init__(self) -> None:
        self.fingerprint = self.info.layout.fingerprint

    def submit(self, submission: Submission, sink: LegSink) -> None:
        """Raises WorkerLostError when the stream is gone, or is now given up; the sink hears nothing then."""
        try:
            self.call.submit(submission)
        except WorkerLostError:
            self.is_lost = True
            self.call.close()
            raise
        self.sinks[submission.handle] = sink
        self._reserved[submission.handle] = (time.monotonic(), len(submission.tokens), len(submission.choices))
        self._view = None

    def cancel(self, handle: int, choices: tuple[int, ...] = ()) -> None:
        """A worker that is gone has cancelled already."""
        if not choices:
            self.forget(handle)
        try:
            self.call.cancel(handle, choices)
        except TailraceError as error:
            log.debug("cancel at %s: %s", self.info.worker_id, error.message)

    def connect(self, handle: int, outlet: Outlet) -> None:
        """Until `disconnect` or `forget`; a leg that is forgotten already is left alone."""
        if handle in self.sinks and self.board is not None:
            self.board.connect(handle, outlet)

    def disconnect(self, handle: int) -> None:
        if self.board is not None:
            self.board.disconnect(handle)

    def forget(self, handle: int) -> LegSink | None:
        """Who listened to it. Its sink hears nothing more."""
        self.disconnect(handle)
        if self._reserved.pop(handle, None) is not None:
            self._view = None
        self.computed(handle)
        return self.sinks.pop(handle, None)

    def on_computed(self, handle: int, tell: Callable[[], None]) -> None:
        """`tell` is called once: when the leg reports, or is forgotten; at once where it is forgotten already."""
        if handle in self.sinks:
            self._uncomputed[handle] = tell
        else:
            tell()

    def computed(self, handle: int) -> None:
        """The leg's prompt is computed: it has drawn a token, or reports, or nobody waits for it. Idempotent."""
        if (tell := self._uncomputed.pop(handle, None)) is not None:
            tell()

    def tell(self, handle: int, function: Callable[[LegSink], None]) -> None:
        """A defect in one request must not take the worker's stream, and with it every other request, down."""
        if (sink := self.sinks.get(handle)) is None:
            return
        try:
            function(sink)
        except Exception:
            self._fail_for_defect(handle)

    def tell_tokens(self, columns: TokenColumns) -> None:
        """As `tell` for each row; this is where every token of the gateway comes through."""
        board = self.board
        for row in board.write(columns) if board is not None else range(len(columns.handles)):
            handle, token_id = columns.handles[row], columns.token_ids[row]
            logprob = columns.logprobs[row] if columns.logprobs is not None else None
            try:
                if board is not None and board.is_settled(row, handle, token_id):
                    continue
                if (sink := self.sinks.get(handle)) is not None:
                    scores = [logprob] if logprob is not None else None
                    sink.on_tokens(columns.choices[row], columns.positions[row], [token_id], scores)
            except Exception:
                self._fail_for_defect(handle)

    def _fail_for_defect(self, handle: int) -> None:
        log.exception("leg %d of %s failed", handle, self.info.worker_id)
        self.fail(handle, InternalError("the gateway failed; its log says why"))

    def fail(self, handle: int, error: TailraceError) -> None:
        if (sink := self.forget(handle)) is None:
            return
        try:
            sink.on_failed(error)
        except Exception:
            log.exception("leg %d of %s cannot be failed", handle, self.info.worker_id)

    def take_load(self, load: Load) -> None:
        self.load = load
        if load.owners is not None:
            self._pairs = PairRates.of(load.owners)
        old = time.monotonic() - RESERVATION_S
        self._reserved = {handle: entry for handle, entry in self._reserved.items() if entry[0] > old}
        self._view = None

    @property
    def unreported(self) -> InFlight:
        """What was submitted and its load report cannot be sure to know."""
        held = self._reserved.values()
        return InFlight(tokens=sum(tokens for _, tokens, _ in held), sequences=sum(num for _, _, num in held))

    def view(self) -> WorkerView:
        """What the router knows of it."""
        if self._view is None:
            self._view = self._seen()
        return self._view

    def _seen(self) -> WorkerView:
        load, unreported = self.load, self.unreported
        return WorkerView(
            worker_id=self.info.worker_id,
            role=self.info.role,
            fingerprint=self.fingerprint,
            num_waiting=load.num_waiting,
            num_running=load.num_running,
            waiting_tokens=load.waiting_tokens,
            free_blocks=load.free_blocks,
            cached_blocks=load.cached_blocks,
            total_blocks=load.total_blocks,
            booked_blocks=load.booked_blocks,
            prefill_tokens_per_s=load.prefill_tokens_per_s,
            decode_step_s=load.decode_step_s,
            max_num_seqs=self.info.max_num_seqs,
            draining=load.draining,
            reserved_tokens=unreported.tokens,
            reserved_sequences=unreported.sequences,
            prefill_curve_s=load.prefill_curve_s,
            decode_base_s=load.decode_base_s,
            decode_row_s=load.decode_row_s,
            transfer_bytes_per_s=self._pairs.usual or load.transfer_bytes_per_s,
            pairs=self._pairs,
        )


class Members:
    """All workers, by worker id. Event loop only."""

    def __init__(
        self,
        *,
        gateway_id: str,
        epoch: int,
        secret: bytes,
        index: PrefixIndex,
        model_digest: str = "",
        step_writer: StepWriter | None = None,
    ) -> None:
        """`model_digest`: workers of another model are refused; empty: any will do."""
        self._step_writer = step_writer
        self.gateway_id = gateway_id
        self._model_digest = model_digest
        self._epoch = epoch
        self._secret = secret
        self.feeds = Feeds(index)
        """Other news of the same workers may be given to them as well."""
        self._members: dict[str, Member] = {}
        self._known: dict[str, WorkerInfo] = {}
        """By address: who was last found there."""
        self._without_line: set[str] = set()
        """Addresses whose step line was opened, and let nothing through."""
        self._nudges: set[asyncio.Task[LedgerReport]] = set()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._interest: Counter[str] = Counter()
        self._handles = itertools.count(1)
        self.on_lost: Callable[[Role], None] = lambda role: None
        self.on_report: Callable[[Member, LegReport], None] = lambda member, report: None
        """Of any leg that this gateway submitted, whether or not anybody listens to it still."""
        self.on_rates: Callable[[str, Sequence[OwnerRate]], None] = lambda needer_id, rates: None
        """At which a worker reads from others, whenever that has changed."""

    def new_handle(self) -> int:
        return next(self._handles)

    def get(self, worker_id: str) -> Member:
        """Raises WorkerLostError when it is gone."""
        if (member := self._members.get(worker_id)) is None:
            raise WorkerLostError(f"worker {worker_id} is gone")
        return member

    def of(self, role: Role) -> list[Member]:
        return [member for member in self._members.values() if member.info.role is role and not member.is_lost]

    def all(self) -> list[Member]:
        return list(self._members.values())

    def is_attached(self, address: str) -> bool:
        return any(member.peer.address == address for member in self._members.values())

    async def ledgers(self) -> list[LedgerReport]:
        """What every worker says of its blocks; one that does not answer is left out, and logged."""
        answers = await asyncio.gather(*(member.peer.ledger() for member in self.all()), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                log.warning("no ledger: %s", answer)
        return [answer for answer in answers if isinstance(answer, LedgerReport)]

    # -- coming and going ---------------------------------------------------------------------------------------------

    def add(self, address: str) -> None:
        """Keep a stream to this address until `remove` has been called as often."""
        self._interest[address] += 1
        if address not in self._tasks:
            self._tasks[address] = asyncio.create_task(self._keep_attached(address), name=f"attach {address}")

    def remove(self, address: str) -> None:
        """The worker has left: its legs fail at once."""
        self._interest[address] -= 1
        if self._interest[address] <= 0:
            del self._interest[address]
            self._known.pop(address, None)
            self._without_line.discard(address)
            if (task := self._tasks.pop(address, None)) is not None:
                task.cancel()

    async def close(self) -> None:
        tasks = [*self._tasks.values(), *self._nudges]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep_attached(self, address: str) -> None:
        trouble = ""
        while True:
            if not self._is_attached_elsewhere(address):
                trouble = await self._attach_once(address, trouble)
            await asyncio.sleep(REATTACH_S)

    async def _attach_once(self, address: str, last: str) -> str:
        """Returns why the stream ended; `last` is why the one before did."""
        peer = Peer(address, self._secret)
        try:
            await self._attach(peer)
        except TailraceError as error:
            log.log(logging.DEBUG if error.message == last else logging.WARNING, "worker at %s", error.message)
            return error.message
        except Exception:
            log.exception("the stream to %s failed; it is opened again", address)
        finally:
            await peer.close()
        return ""

    def _is_attached_elsewhere(self, address: str) -> bool:
        """A worker with two addresses would drop the stream to one for the stream to the other, and so on for ever."""
        if (known := self._known.get(address)) is None or (member := self._members.get(known.worker_id)) is None:
            return False
        return member.peer.address != address and member.info.epoch == known.epoch

    async def _attach(self, peer: Peer) -> None:
        """Listen to one worker until its stream ends."""
        call = peer.attach(self.gateway_id, self._epoch)
        silence = Silence(PEER_LOSS_S, call.close)
        watch = WorkWatch()
        member: Member | None = None

        def take(event: StepEvents) -> None:
            nonlocal member
            silence.heard()
            if event.info is not None:
                member = self._welcome(event.info, call, peer)
            if member is None:
                raise WorkerLostError(f"{peer.address}: the first event does not say who the worker is")
            if watch.needs_nudge(event.step, member.load, member.info.worker_id):
                self._nudge(member)
            self._spread(member, event)

        try:
            direct = None if peer.address in self._without_line else take
            async with contextlib.aclosing(call.events(direct)) as events:
                async for event in events:
                    take(event)
        except WorkerLostError:
            if not silence.is_over:
                raise
            if call.has_dumb_line:
                self._without_line.add(peer.address)
            raise WorkerLostError(f"{peer.address}: silent for {PEER_LOSS_S:g} s") from None
        finally:
            silence.stop()
            call.close()
            if member is not None:
                self._farewell(member)

    def _welcome(self, info: WorkerInfo, call: AttachCall, peer: Peer) -> Member:
        self._check_layout(info)
        if (old := self._members.get(info.worker_id)) is not None:
            if old.info.epoch > info.epoch:
                raise WorkerLostError(f"{peer.address}: a newer process serves as {info.worker_id}")
            self._farewell(old)
            old.call.close()
        self._known[peer.address] = info
        board = Board(self._step_writer) if self._step_writer is not None else None
        feed = self.feeds.hold(Holder(info.worker_id, info.epoch, info.num_blocks), Source.ATTACH, peer.snapshot)
        member = Member(info, call, peer, feed, board=board)
        self._members[info.worker_id] = member
        who, what = f"{info.role} worker {info.worker_id}", info.layout.arithmetic
        log.info("%s attached: %s; %d blocks at %s", who, what, info.num_blocks, info.address)
        return member

    def _check_layout(self, info: WorkerInfo) -> None:
        """Raises LayoutMismatchError for a worker of another model; warns of one that fits none of the other role."""
        if self._model_digest and info.layout.model_digest != self._model_digest:
            raise LayoutMismatchError(
                f"{info.address}: {info.worker_id} serves another model: "
                f"model_digest: gateway={self._model_digest} worker={info.layout.model_digest}"
            )
        for other in self.all():
            if other.info.role is info.role or Role.KVSTORE in (other.info.role, info.role):
                continue
            owner, needer = (other.info, info) if info.role is Role.DECODE else (info, other.info)
            if differences := owner.layout.differences(needer.layout):
                names = owner.worker_id, needer.worker_id
                log.warning("%s and %s cannot be paired (owner, needer): %s", *names, "; ".join(differences))

    def _farewell(self, member: Member) -> None:
        worker_id = member.info.worker_id
        if self._members.get(worker_id) is not member:
            return
        del self._members[worker_id]
        self.feeds.release(member.feed, Source.ATTACH)
        log.warning("%s worker %s is gone; %d legs fail", member.info.role, worker_id, len(member.sinks))
        self.on_lost(member.info.role)
        for handle in list(member.sinks):
            member.fail(handle, WorkerLostError(f"worker {worker_id} is gone"))

    def _nudge(self, member: Member) -> None:
        task = asyncio.create_task(member.peer.ledger(), name=f"nudge {member.info.worker_id}")
        self._nudges.add(task)
        task.add_done_callback(self._nudged)

    def _nudged(self, task: "asyncio.Task[LedgerReport]") -> None:
        self._nudges.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("%s failed: %s", task.get_name(), error)

    # -- what they say ------------------------------------------------------------------------------------------------

    def _spread(self, member: Member, event: StepEvents) -> None:
        if event.load is not None:
            member.take_load(event.load)
            if event.load.owners is not None:
                self.on_rates(member.info.worker_id, event.load.owners)
        if event.kv_events is not None:
            member.feed.take(event.kv_events)
        member.tell_tokens(event.tokens)
        # Reports before ends: the last end of a request asks for its usage.
        for report in event.reports:
            member.computed(report.handle)
            self.on_report(member, report)
            member.tell(report.handle, partial(_tell_report, report))
        for finish in event.finished:
            member.tell(finish.handle, partial(_tell_finish, finish))
        for failure in event.failed:
            member.fail(failure.handle, failure.error)


def _tell_report(report: LegReport, sink: LegSink) -> None:
    sink.on_report(report)


def _tell_finish(finish: ChoiceFinished, sink: LegSink) -> None:
    sink.on_finished(finish.choice, finish.reason)

"""The workers of this gateway: who is attached, how busy each is, and what each of them says.

A member is an address that the gateway keeps an `Attach` stream to: named in the configuration for good, or for as long
as the worker keeps its `Join` stream open. When the stream breaks, every leg on it fails at once; the address is tried
again.
"""

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Protocol

from tailrace.errors import InternalError, LayoutMismatchError, TailraceError, WorkerLostError
from tailrace.index.memory import MemoryIndex
from tailrace.kv.events import KVEvent
from tailrace.messages import KvEventBatch, LedgerReport, LegReport, Load, StepEvents, Submission, WorkerInfo
from tailrace.policy.routing import WorkerView
from tailrace.rpc.client import AttachCall, Peer
from tailrace.rpc.options import PEER_LOSS_S
from tailrace.types import FinishReason, Role, TokenLogprob

log = logging.getLogger(__name__)

REATTACH_S = 0.3
RESERVATION_S = 0.25
"""How long a submission counts beside a worker's load report, until a report that surely knows it has come."""
HUNG_S = 60.0
"""A worker with work to do whose step counter stands still for this long is hung, however lively its answers are."""


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
    load: Load = field(default_factory=Load)
    sinks: dict[int, LegSink] = field(default_factory=dict)
    _reserved: dict[int, tuple[float, int, int]] = field(default_factory=dict)
    """By handle: when, tokens, sequences."""

    def submit(self, submission: Submission, sink: LegSink) -> None:
        """Raises WorkerLostError when the stream is gone; the sink hears nothing then."""
        self.call.submit(submission)
        self.sinks[submission.handle] = sink
        self._reserved[submission.handle] = (time.monotonic(), len(submission.tokens), len(submission.choices))

    def cancel(self, handle: int, choices: tuple[int, ...] = ()) -> None:
        """A worker that is gone has cancelled already."""
        if not choices:
            self.forget(handle)
        try:
            self.call.cancel(handle, choices)
        except TailraceError as error:
            log.debug("cancel at %s: %s", self.info.worker_id, error.message)

    def forget(self, handle: int) -> None:
        self.sinks.pop(handle, None)
        self._reserved.pop(handle, None)

    def take_load(self, load: Load) -> None:
        self.load = load
        old = time.monotonic() - RESERVATION_S
        self._reserved = {handle: entry for handle, entry in self._reserved.items() if entry[0] > old}

    def view(self) -> WorkerView:
        load = self.load
        return WorkerView(
            worker_id=self.info.worker_id,
            role=self.info.role,
            fingerprint=self.info.layout.fingerprint,
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
            reserved_tokens=sum(tokens for _, tokens, _ in self._reserved.values()),
            reserved_sequences=sum(sequences for _, _, sequences in self._reserved.values()),
        )


class Members:
    """All workers, by worker id. Event loop only."""

    def __init__(
        self, *, gateway_id: str, epoch: int, secret: bytes, index: MemoryIndex, model_digest: str = ""
    ) -> None:
        """`model_digest`: workers of another model are refused; empty: any will do."""
        self.gateway_id = gateway_id
        self._model_digest = model_digest
        self._epoch = epoch
        self._secret = secret
        self._index = index
        self._members: dict[str, Member] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._interest: Counter[str] = Counter()
        self._handles = itertools.count(1)
        self.on_lost: Callable[[Role], None] = lambda role: None

    def new_handle(self) -> int:
        return next(self._handles)

    def get(self, worker_id: str) -> Member:
        """Raises WorkerLostError when it is gone."""
        if (member := self._members.get(worker_id)) is None:
            raise WorkerLostError(f"worker {worker_id} is gone")
        return member

    def of(self, role: Role) -> list[Member]:
        return [member for member in self._members.values() if member.info.role is role]

    def all(self) -> list[Member]:
        return list(self._members.values())

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
            if (task := self._tasks.pop(address, None)) is not None:
                task.cancel()

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep_attached(self, address: str) -> None:
        last = ""
        while True:
            peer = Peer(address, self._secret)
            try:
                await self._attach(peer)
            except TailraceError as error:
                log.log(logging.DEBUG if error.message == last else logging.WARNING, "worker at %s", error.message)
                last = error.message
            except Exception:
                log.exception("the stream to %s failed; it is opened again", address)
            finally:
                await peer.close()
            await asyncio.sleep(REATTACH_S)

    async def _attach(self, peer: Peer) -> None:
        """Listen to one worker until its stream ends."""
        call = peer.attach(self.gateway_id, self._epoch)
        member: Member | None = None
        watch = _Watch()
        try:
            events = aiter(call.events())
            while (event := await _next_event(events, peer.address)) is not None:
                if event.info is not None:
                    member = self._welcome(Member(event.info, call, peer))
                if member is None:
                    raise WorkerLostError(f"{peer.address}: the first event does not say who the worker is")
                watch.check(event, member)
                self._spread(member, event)
        finally:
            call.close()
            if member is not None:
                self._farewell(member)

    def _welcome(self, member: Member) -> Member:
        info = member.info
        self._check_layout(info)
        if (old := self._members.get(info.worker_id)) is not None:
            self._farewell(old)
        self._members[info.worker_id] = member
        log.info("%s worker %s attached: %d blocks at %s", info.role, info.worker_id, info.num_blocks, info.address)
        self._index.reset(info.worker_id, info.epoch, [], 0)
        task = asyncio.create_task(self._resync(member), name=f"snapshot {info.worker_id}")
        task.add_done_callback(_log_failure)
        return member

    def _check_layout(self, info: WorkerInfo) -> None:
        """Raises LayoutMismatchError for a worker of another model; warns of one that fits none of the other role."""
        if self._model_digest and info.layout.model_digest != self._model_digest:
            raise LayoutMismatchError(
                f"{info.address}: {info.worker_id} serves another model: "
                f"model_digest: gateway={self._model_digest} worker={info.layout.model_digest}"
            )
        for other in self.all():
            differences = other.info.layout.differences(info.layout) if other.info.role is not info.role else ()
            if differences:
                names = other.info.worker_id, info.worker_id
                log.warning("%s and %s cannot be paired (owner, needer): %s", *names, "; ".join(differences))

    def _farewell(self, member: Member) -> None:
        worker_id = member.info.worker_id
        if self._members.get(worker_id) is not member:
            return
        del self._members[worker_id]
        self._index.drop_worker(worker_id)
        log.warning("%s worker %s is gone; %d legs fail", member.info.role, worker_id, len(member.sinks))
        self.on_lost(member.info.role)
        sinks, member.sinks = list(member.sinks.values()), {}
        for sink in sinks:
            sink.on_failed(WorkerLostError(f"worker {worker_id} is gone"))

    # -- what they say ------------------------------------------------------------------------------------------------

    def _spread(self, member: Member, event: StepEvents) -> None:
        if event.load is not None:
            member.take_load(event.load)
        if event.kv_events is not None:
            self._index_events(member, event.kv_events)
        columns = event.tokens
        for row, handle in enumerate(columns.handles):
            if (sink := member.sinks.get(handle)) is not None:
                logprob = columns.logprobs[row] if columns.logprobs is not None else None
                logprobs = [logprob] if logprob is not None else None
                token = (columns.choices[row], columns.positions[row], [columns.token_ids[row]], logprobs)
                _tell(member, handle, sink.on_tokens, *token)
        # Reports before ends: the last end of a request asks for its usage.
        for report in event.reports:
            if (sink := member.sinks.get(report.handle)) is not None:
                _tell(member, report.handle, sink.on_report, report)
        for finish in event.finished:
            if (sink := member.sinks.get(finish.handle)) is not None:
                _tell(member, finish.handle, sink.on_finished, finish.choice, finish.reason)
        for failure in event.failed:
            if (sink := member.sinks.get(failure.handle)) is not None:
                member.forget(failure.handle)
                sink.on_failed(failure.error)

    def _index_events(self, member: Member, batch: KvEventBatch) -> None:
        info = member.info
        if not self._index.apply(info.worker_id, info.epoch, batch.first_sequence, batch.events):
            log.info("events of %s are missing; asking for all it has", info.worker_id)
            task = asyncio.create_task(self._resync(member), name=f"snapshot {info.worker_id}")
            task.add_done_callback(_log_failure)

    async def _resync(self, member: Member) -> None:
        """Entries are hints: what changes while the snapshot travels comes as an event after it."""
        events: list[KVEvent] = []
        sequence = 0
        async for batch in member.peer.snapshot():
            events.extend(batch.events)
            sequence = batch.first_sequence
        info = member.info
        self._index.reset(info.worker_id, info.epoch, [event.block_hash for event in events], sequence)


def _tell(member: Member, handle: int, function: Callable[..., None], *args: object) -> None:
    """A defect in one request must not take the worker's stream, and with it every other request, down."""
    try:
        function(*args)
    except Exception:
        log.exception("leg %d of %s failed", handle, member.info.worker_id)
        if (sink := member.sinks.pop(handle, None)) is not None:
            sink.on_failed(InternalError("the gateway failed; its log says why"))


class _Watch:
    """Finds the worker that answers but does not work."""

    def __init__(self) -> None:
        self._step = -1
        self._moved_at = time.monotonic()

    def check(self, event: StepEvents, member: Member) -> None:
        """Raises WorkerLostError when the step counter stands still with work to do."""
        now = time.monotonic()
        load = member.load
        if event.step != self._step or not (load.num_running or load.num_waiting):
            self._step, self._moved_at = event.step, now
        elif now - self._moved_at > HUNG_S:
            raise WorkerLostError(f"{member.info.worker_id} hangs: no step in {HUNG_S:g} s with work to do")


async def _next_event(events: AsyncIterator[StepEvents], address: str) -> StepEvents | None:
    """None when the stream has ended. Raises WorkerLostError when it is silent for too long."""
    try:
        async with asyncio.timeout(PEER_LOSS_S):
            return await anext(events, None)
    except TimeoutError:
        raise WorkerLostError(f"{address}: silent for {PEER_LOSS_S:g} s") from None


def _log_failure(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("%s failed: %s", task.get_name(), error)

"""Workers without processes: the gateway's real Members and PairDispatcher, attached to workers that a test plays."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from unittest import mock

from services.gateway import members as members_module
from services.gateway.dispatcher import PairDispatcher
from services.gateway.generation import GenerationRequest, Usage
from services.gateway.members import Members
from services.gateway.session import RequestSession
from tailrace.errors import TailraceError, WorkerLostError
from tailrace.index.prefix_index import PrefixIndex
from tailrace.kv.chain_memo import ChainMemo
from tailrace.kv.events import KVEvents
from tailrace.kv.layout import KVLayout, LayerGroup
from tailrace.messages import (
    ChoiceFinished,
    KvEventBatch,
    LedgerReport,
    LegFailed,
    LegReport,
    Load,
    StepEvents,
    Submission,
    WorkerInfo,
)
from tailrace.policy.routing import Route
from tailrace.types import FinishReason, Role, SamplingParams, TokenLogprob
from tests.helpers.gateway_app import step_writer
from tests.helpers.index import compact_index
from tests.helpers.waiting import PATIENCE_S

SECRET = b"a secret of the tests"
DIGEST = "a model"
BLOCK = 4
LAYOUT = KVLayout(
    model_digest=DIGEST,
    weights_digest="some weights",
    quantization="none",
    numerics_version=1,
    num_layers=1,
    num_kv_heads=1,
    head_dim=8,
    block_size=BLOCK,
    kv_dtype="float32",
    groups=(LayerGroup("full", (0,)),),
)
IDLE = Load(total_blocks=100, free_blocks=100)


def worker_info(worker_id: str, role: Role, *, epoch: int = 1, address: str = "", **layout: object) -> WorkerInfo:
    return WorkerInfo(
        worker_id=worker_id,
        epoch=epoch,
        role=role,
        layout=replace(LAYOUT, **layout),
        model="m",
        max_model_len=1000,
        max_num_seqs=8,
        num_blocks=100,
        address=address or f"{worker_id}:1",
        version="0",
    )


class FakeCall:
    """One Attach stream, from the gateway's end."""

    def __init__(self, worker: "FakeWorker") -> None:
        self.worker = worker
        self.submissions: list[Submission] = []
        self.cancels: list[tuple[int, tuple[int, ...]]] = []
        self.is_open = True
        self.has_dumb_line = False
        self.ended = asyncio.Event()
        self.inbox: asyncio.Queue[StepEvents | TailraceError | None] = asyncio.Queue()

    async def events(self, direct: Callable[[StepEvents], None] | None) -> AsyncIterator[StepEvents]:
        try:
            yield StepEvents(info=self.worker.info, load=self.worker.load)
            while (event := await self.inbox.get()) is not None:
                if isinstance(event, TailraceError):
                    raise event
                yield event
                self.inbox.task_done()
        finally:
            self.is_open = False
            self.ended.set()

    def submit(self, submission: Submission) -> None:
        if not self.is_open or self.worker.is_deaf:
            raise WorkerLostError(f"{self.worker.info.worker_id}: the stream is closed")
        self.submissions.append(submission)

    def cancel(self, handle: int, choices: tuple[int, ...] = ()) -> None:
        if not self.is_open:
            raise WorkerLostError(f"{self.worker.info.worker_id}: the stream is closed")
        self.cancels.append((handle, choices))

    def close(self) -> None:
        if self.is_open:
            self.inbox.put_nowait(WorkerLostError("closed on this side"))


class FakePeer:
    """What `tailrace.rpc.client.Peer` is to Members."""

    def __init__(self, address: str, worker: "FakeWorker | None") -> None:
        self.address = address
        self._worker = worker
        self.is_closed = False

    def attach(self, gateway_id: str, gateway_epoch: int) -> FakeCall:
        if self._worker is None:
            raise WorkerLostError(f"{self.address}: connection refused")
        call = FakeCall(self._worker)
        self._worker.calls.append(call)
        return call

    async def close(self) -> None:
        self.is_closed = True

    async def ledger(self) -> LedgerReport:
        assert self._worker is not None
        self._worker.num_ledgers += 1
        info = self._worker.info
        return LedgerReport(info.worker_id, info.epoch, 100, 100, 0, 0, 0, 0, 0)

    async def snapshot(self) -> AsyncIterator[KvEventBatch]:
        assert self._worker is not None
        self._worker.num_snapshots += 1
        await self._worker.may_snapshot.wait()
        if self._worker.snapshot_error is not None:
            raise self._worker.snapshot_error
        yield self._worker.snapshot


@dataclass(eq=False)
class FakeWorker:
    """A worker at an address. The test says what it says."""

    info: WorkerInfo
    load: Load = IDLE
    calls: list[FakeCall] = field(default_factory=list)
    is_deaf: bool = False
    """Refuses submissions, as a stream whose end nobody has noticed yet."""
    snapshot: KvEventBatch = field(default_factory=lambda: KvEventBatch(1, 0, KVEvents()))
    snapshot_error: TailraceError | None = None
    may_snapshot: asyncio.Event = field(default_factory=asyncio.Event)
    num_snapshots: int = 0
    num_ledgers: int = 0
    step: int = 0

    def __post_init__(self) -> None:
        self.may_snapshot.set()

    @property
    def call(self) -> FakeCall:
        return self.calls[-1]

    @property
    def submissions(self) -> list[Submission]:
        return [submission for call in self.calls for submission in call.submissions]

    @property
    def cancels(self) -> list[tuple[int, tuple[int, ...]]]:
        return [cancel for call in self.calls for cancel in call.cancels]

    @property
    def last(self) -> Submission:
        return self.submissions[-1]

    async def say(self, event: StepEvents, *, call: FakeCall | None = None) -> None:
        """Returns when the gateway has taken it in."""
        call = call or self.call
        self.step += 1
        event.step = event.step or self.step
        call.inbox.put_nowait(event)
        waits = [asyncio.create_task(call.inbox.join()), asyncio.create_task(call.ended.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    async def tokens(
        self,
        ids: Sequence[int],
        *,
        choice: int = 0,
        position: int | None = None,
        handle: int | None = None,
        logprobs: Sequence[TokenLogprob] | None = None,
        report: LegReport | None = None,
        reason: FinishReason | None = None,
    ) -> None:
        """Of the last submission, and from its end on, unless told otherwise; a report and an end come with them."""
        event = StepEvents()
        handle = self.last.handle if handle is None else handle
        position = len(self.last.tokens) if position is None else position
        for i, token_id in enumerate(ids):
            event.tokens.add(handle, choice, position + i, token_id, logprobs[i] if logprobs is not None else None)
        if report is not None:
            event.reports.append(replace(report, handle=handle))
        if reason is not None:
            event.finished.append(ChoiceFinished(handle, choice, reason))
        await self.say(event)

    async def fail(self, error: TailraceError, *, handle: int | None = None) -> None:
        await self.say(StepEvents(failed=[LegFailed(self.last.handle if handle is None else handle, error)]))

    async def die(self) -> None:
        """Its stream breaks; where it is still in the network, the gateway finds it again."""
        call = self.call
        call.inbox.put_nowait(WorkerLostError(f"{self.info.address}: connection reset"))
        await call.ended.wait()
        await settle()


class FakeNetwork:
    """Who answers at which address."""

    def __init__(self, *workers: FakeWorker) -> None:
        self.workers = {worker.info.address: worker for worker in workers}
        self.peers: list[FakePeer] = []

    def connect(self, address: str, secret: bytes) -> FakePeer:
        assert secret == SECRET
        self.peers.append(FakePeer(address, self.workers.get(address)))
        return self.peers[-1]

    @contextmanager
    def used(self, reattach_s: float = 0.001) -> Iterator[None]:
        with (
            mock.patch.object(members_module, "Peer", self.connect),
            mock.patch.object(members_module, "REATTACH_S", reattach_s),
        ):
            yield


@dataclass(eq=False)
class FakeCluster:
    network: FakeNetwork
    prefills: list[FakeWorker]
    decodes: list[FakeWorker]
    index: PrefixIndex
    members: Members
    dispatcher: PairDispatcher
    stores: list[FakeWorker] = field(default_factory=list)

    @property
    def prefill(self) -> FakeWorker:
        return self.prefills[0]

    @property
    def decode(self) -> FakeWorker:
        return self.decodes[0]

    async def leave(self, worker: FakeWorker) -> None:
        """Dies, and is not found again."""
        del self.network.workers[worker.info.address]
        await worker.die()

    async def submit(self, prompt: Sequence[int] = (1, 2, 3, 4, 5), **fields: object) -> RequestSession:
        return await self.dispatcher.submit(make_request(prompt, **fields))

    def dry_run(self, prompt: Sequence[int]) -> Route:
        return self.dispatcher.route(make_request(prompt))

    def pair_of(self, session: RequestSession) -> tuple[FakeWorker | None, FakeWorker]:
        """Where the newest attempt runs."""
        attempts = session._attempts
        names = {worker.info.worker_id: worker for worker in [*self.prefills, *self.decodes]}
        attempt = attempts[-1]
        assert attempt.decode is not None
        prefill = names[attempt.prefill.member.info.worker_id] if attempt.prefill is not None else None
        return prefill, names[attempt.decode.member.info.worker_id]

    def assert_nothing_held(self) -> None:
        assert self.dispatcher.num_running == 0
        for member in self.members.all():
            assert member.sinks == {}, member.info.worker_id
            assert not member.board, member.info.worker_id
            assert member._reserved == {}, member.info.worker_id
            assert member._uncomputed == {}, member.info.worker_id
        assert self.dispatcher.router._reservations._queues == {}


@asynccontextmanager
async def fake_cluster(
    prefill: int = 1,
    decode: int = 1,
    *,
    stores: int = 0,
    max_concurrent: int = 10,
    load: Load = IDLE,
    reattach_s: float = 0.001,
    routing_policy: str = "cost",
    clock: Callable[[], float] = lambda: 0.0,
) -> AsyncIterator[FakeCluster]:
    """Leaving it without an error asserts that no request left anything behind."""
    prefills = [FakeWorker(worker_info(f"p{i}", Role.PREFILL), load) for i in range(prefill)]
    decodes = [FakeWorker(worker_info(f"d{i}", Role.DECODE), load) for i in range(decode)]
    kept = [FakeWorker(worker_info(f"s{i}", Role.KVSTORE), load) for i in range(stores)]
    network = FakeNetwork(*prefills, *decodes, *kept)
    with network.used(reattach_s):
        index = compact_index()
        members = Members(
            gateway_id="g", epoch=1, secret=SECRET, index=index, model_digest=DIGEST, step_writer=step_writer()
        )
        dispatcher = PairDispatcher(
            members,
            index,
            ChainMemo(),
            secret=SECRET,
            max_concurrent=max_concurrent,
            routing_policy=routing_policy,
            # Time stands still: the same events are routed in the same way each time.
            clock=clock,
        )
        for address in network.workers:
            members.add(address)
        await until(lambda: len(members.all()) == prefill + decode + stores)
        cluster = FakeCluster(network, prefills, decodes, index, members, dispatcher, kept)
        try:
            yield cluster
            cluster.assert_nothing_held()
        finally:
            await members.close()


def make_request(prompt: Sequence[int] = (1, 2, 3, 4, 5), **fields: object) -> GenerationRequest:
    sampling = fields.pop("sampling", SamplingParams(max_tokens=8, seed=7))
    return GenerationRequest("r", list(prompt), sampling, **fields)  # type: ignore[arg-type]


async def settle() -> None:
    """Lets everything that is ready run."""
    for _ in range(20):
        await asyncio.sleep(0)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - nobody says when
            await asyncio.sleep(0)


@dataclass(frozen=True)
class Tokens:
    choice: int
    position: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None


@dataclass(frozen=True)
class ChoiceEnded:
    choice: int
    reason: FinishReason


@dataclass(frozen=True)
class Finished:
    usage: Usage


Event = Tokens | ChoiceEnded | Finished


class Heard:
    """A Listener that remembers what it is told."""

    def __init__(self, session: RequestSession, *, stop: int | None = None) -> None:
        """`stop`: the choice that is finished as soon as some of its tokens are heard."""
        self.events: list[Event] = []
        self.error: Exception | None = None
        self.has_ended = asyncio.Event()
        self._session = session
        self._stop = stop
        session.listen(self)

    def on_tokens(
        self, choice: int, position: int, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] | None
    ) -> None:
        assert not self.has_ended.is_set()
        scores = None if logprobs is None else list(logprobs)
        self.events.append(Tokens(choice, position, list(token_ids), scores))
        if choice == self._stop:
            self._session.finish_choice(choice)

    def on_choice_ended(self, choice: int, reason: FinishReason) -> None:
        assert not self.has_ended.is_set()
        self.events.append(ChoiceEnded(choice, reason))

    def on_finished(self, usage: Usage) -> None:
        assert not self.has_ended.is_set()
        self.events.append(Finished(usage))
        self.has_ended.set()

    def on_failed(self, error: Exception) -> None:
        assert not self.has_ended.is_set()
        self.error = error
        self.has_ended.set()


async def collect(session: RequestSession) -> list[Event]:
    events, error = await events_and_error(session)
    if error is not None:
        raise error
    return events


async def events_and_error(session: RequestSession) -> tuple[list[Event], Exception | None]:
    """When the request has ended, whoever ended it."""
    heard = Heard(session)
    async with asyncio.timeout(PATIENCE_S):
        await heard.has_ended.wait()
    return heard.events, heard.error


def prose(events: Sequence[Event]) -> list[str]:
    """As "0@5: 11 12", "0 ends: STOP", "usage"."""
    lines = []
    for event in events:
        match event:
            case Tokens():
                lines.append(f"{event.choice}@{event.position}: {' '.join(map(str, event.token_ids))}")
            case ChoiceEnded():
                lines.append(f"{event.choice} ends: {event.reason.name}")
            case Finished():
                lines.append("usage")
    return lines

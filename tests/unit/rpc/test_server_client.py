"""Members of a cluster over real gRPC on loopback: who may call, what a refusal says, what an end of a stream does."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tailrace.errors import (
    ConfigError,
    InternalError,
    InvalidRequestError,
    LayoutMismatchError,
    NotFoundError,
    OverloadedError,
    TailraceError,
    TransferError,
    UnauthenticatedError,
    WorkerLostError,
)
from tailrace.kv.events import KVEvents
from tailrace.messages import KvEventBatch, LedgerReport, LendDone, LendTerms, LentBlocks, Load, StepEvents
from tailrace.rpc.auth import AUTH_HEADER, control_token
from tailrace.rpc.client import AttachCall, Peer
from tailrace.rpc.gen import control_pb2_grpc, kv_pb2_grpc, worker_pb2, worker_pb2_grpc
from tailrace.rpc.server import ControlServicer, KvOwnerServicer, Server, WorkerServicer
from tailrace.transfer.endpoints import PeerEndpoints, StreamEndpoint
from tailrace.worker.attach import Attachments, Leg
from tests.helpers.values import SECRET, make_info, make_layout, make_submission
from tests.helpers.waiting import until

TERMS = LendTerms("r", 0, b"t", "d", 9, "stream")
LENT = LentBlocks(0, [1], [2], [3])


class World:
    """Handler, owner and controlled in one: remembers, and answers what a test has put there."""

    def __init__(self) -> None:
        self.layout = make_layout()
        self.legs: list[Leg] = []
        self.cancelled: list[tuple[int, tuple[int, ...]]] = []
        self.lent: list[LentBlocks | LendDone | TailraceError] = []
        self.open_lends = 0
        self.is_draining = False

    def begin(self, leg: Leg) -> None:
        self.legs.append(leg)

    def cancel(self, leg: Leg, choices: tuple[int, ...]) -> None:
        self.cancelled.append((leg.submission.handle, choices))

    def meet(self, needer_id: str, needer_epoch: int) -> PeerEndpoints:
        return PeerEndpoints("w", 7, 256, 16, None, StreamEndpoint("127.0.0.1", 5, False))

    async def lend(self, terms: LendTerms) -> AsyncGenerator[LentBlocks | LendDone, None]:
        self.open_lends += 1
        try:
            for event in self.lent:
                if isinstance(event, TailraceError):
                    raise event
                yield event
            await asyncio.Event().wait()
        finally:
            self.open_lends -= 1

    def drain(self) -> None:
        self.is_draining = True

    def load(self) -> Load:
        return Load(num_running=3)

    async def ledger(self) -> LedgerReport:
        return LedgerReport("w", 7, 16, 16, 0, 0, 0, 0, 0)

    async def snapshot(self) -> AsyncIterator[KvEventBatch]:
        for at in range(2):
            yield KvEventBatch(7, 5, KVEvents.published([bytes([at]) * 16]))


@asynccontextmanager
async def serving(world: World) -> AsyncIterator[tuple[str, Attachments]]:
    server = Server(SECRET)
    attachments = Attachments(make_info(), world, steps=lambda: 1)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerServicer(lambda: attachments), server.grpc)
    kv_pb2_grpc.add_KvOwnerServiceServicer_to_server(KvOwnerServicer(world), server.grpc)
    control_pb2_grpc.add_ControlServiceServicer_to_server(ControlServicer(world), server.grpc)
    port = server.bind("127.0.0.1", 0)
    await server.start()
    try:
        yield f"127.0.0.1:{port}", attachments
    finally:
        await server.stop()


@asynccontextmanager
async def peer_of(address: str, secret: bytes = SECRET) -> AsyncIterator[Peer]:
    peer = Peer(address, secret)
    try:
        yield peer
    finally:
        await peer.close()


async def first_of(call: AttachCall) -> StepEvents:
    return await anext(call.events())


async def drain(events: AsyncIterator[StepEvents]) -> None:
    async for _ in events:
        pass


# -- who may call -----------------------------------------------------------------------------------------------------


async def test_without_the_cluster_secret_every_kind_of_call_is_refused() -> None:
    async with serving(World()) as (address, attachments), peer_of(address, b"wrong") as peer:
        with pytest.raises(UnauthenticatedError, match="secret"):
            await peer.load()
        with pytest.raises(UnauthenticatedError):
            await anext(peer.snapshot())
        with pytest.raises(UnauthenticatedError):
            async with peer.lend(TERMS) as events:
                await anext(events)
        with pytest.raises(UnauthenticatedError):
            await first_of(peer.attach("g", 1))
        assert attachments._sessions == {}


async def test_health_is_for_everybody_and_knows_that_we_serve() -> None:
    async with serving(World()) as (address, _), grpc.aio.insecure_channel(address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_port_in_use_is_a_config_error() -> None:
    async with serving(World()) as (address, _):
        with pytest.raises(ConfigError) as refusal:
            Server(SECRET).bind("127.0.0.1", int(address.rpartition(":")[2]))
        assert refusal.value.param == "port"


async def test_nobody_there_is_a_lost_worker() -> None:
    async with peer_of("127.0.0.1:9") as peer:
        with pytest.raises(WorkerLostError, match=r"127\.0\.0\.1:9"):
            await peer.load()


# -- meet and lend ----------------------------------------------------------------------------------------------------


async def test_meeting_tells_where_to_read() -> None:
    world = World()
    async with serving(world) as (address, _), peer_of(address) as peer:
        endpoints, layout = await peer.meet("d", 9, make_layout(), ("stream",))
        assert (endpoints, layout) == (world.meet("d", 9), world.layout)


async def test_layouts_that_differ_are_refused_by_name_before_any_byte_moves() -> None:
    async with serving(World()) as (address, _), peer_of(address) as peer:
        with pytest.raises(LayoutMismatchError) as refusal:
            await peer.meet("d", 9, make_layout(kv_dtype="bfloat16", block_size=8), ("stream",))
        assert "kv_dtype: owner=float32 needer=bfloat16" in refusal.value.message
        assert "block_size: owner=4 needer=8" in refusal.value.message


@pytest.mark.parametrize("leave", ["at once", "between events", "while waiting", "by cancel"])
async def test_a_lend_ends_with_its_stream(leave: str) -> None:
    world = World()
    world.lent = [LENT, LENT]
    async with serving(world) as (address, _), peer_of(address) as peer:

        async def needer() -> None:
            async with peer.lend(TERMS) as events:
                for _ in range({"at once": 0, "between events": 1}.get(leave, 2)):
                    assert await anext(events) == LENT
                if leave == "while waiting":
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(0.02):
                            await anext(events)
                if leave == "by cancel":
                    await asyncio.Event().wait()

        task = asyncio.create_task(needer())
        if leave == "by cancel":
            await until(lambda: world.open_lends == 1)
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: world.open_lends == 0)


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (InvalidRequestError("e1"), InvalidRequestError),
        (UnauthenticatedError("e2"), UnauthenticatedError),
        (NotFoundError("e3"), NotFoundError),
        (OverloadedError("e4"), OverloadedError),
        (LayoutMismatchError("e5"), LayoutMismatchError),
        (TransferError("e6"), WorkerLostError),
        (InternalError("e7"), WorkerLostError),
    ],
)
async def test_an_owners_error_arrives_with_its_meaning(error: TailraceError, seen: type[TailraceError]) -> None:
    world = World()
    world.lent = [LENT, error]
    async with serving(world) as (address, _), peer_of(address) as peer, peer.lend(TERMS) as events:
        assert await anext(events) == LENT
        with pytest.raises(seen, match=f"{address}: {error.message}"):
            await anext(events)


# -- control ----------------------------------------------------------------------------------------------------------


async def test_control_answers() -> None:
    world = World()
    async with serving(world) as (address, _), peer_of(address) as peer:
        assert await peer.load() == world.load()
        assert await peer.ledger() == await world.ledger()
        assert [batch async for batch in peer.snapshot()] == [batch async for batch in world.snapshot()]
        await peer.drain()
        assert world.is_draining


# -- attach -----------------------------------------------------------------------------------------------------------


async def test_a_gateway_submits_cancels_and_hears() -> None:
    world = World()
    async with serving(world) as (address, attachments), peer_of(address) as peer:
        call = peer.attach("g", 1)
        events = call.events()
        assert (await anext(events)).info == make_info()
        submission = make_submission(4)
        call.submit(submission)
        call.cancel(4, (0,))
        call.cancel(4)
        await until(lambda: len(world.cancelled) == 2)
        assert [leg.submission for leg in world.legs] == [submission]
        assert world.cancelled == [(4, (0,)), (4, ())]
        attachments._sessions["g"].add_failure(4, OverloadedError("full"))
        while not (event := await anext(events)).failed:
            pass
        assert isinstance(event.failed[0].error, OverloadedError)
        call.close()


async def test_a_stream_without_a_greeting_is_refused() -> None:
    async with serving(World()) as (address, attachments), grpc.aio.insecure_channel(address) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        call = stub.Attach(metadata=((AUTH_HEADER, control_token(SECRET)),))
        await call.write(worker_pb2.AttachRequest(cancel=worker_pb2.Cancel(handle=1)))
        assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "greeting" in (await call.details() or "")
        assert attachments._sessions == {}


async def test_a_bad_submission_fails_alone() -> None:
    world = World()
    async with serving(world) as (address, _), peer_of(address) as peer:
        call = peer.attach("g", 1)
        events = call.events()
        await anext(events)
        call.submit(make_submission(1, num_prompt_tokens=0))
        call.submit(make_submission(2))
        while not (event := await anext(events)).failed:
            pass
        assert [(f.handle, f.error.param) for f in event.failed] == [(1, "num_prompt_tokens")]
        await until(lambda: world.legs)
        assert world.legs[0].submission.handle == 2


@pytest.mark.parametrize("how", ["close", "channel", "fenced"])
async def test_whatever_ends_a_stream_cancels_what_came_over_it(how: str) -> None:
    world = World()
    async with serving(world) as (address, attachments), peer_of(address) as peer:
        call = peer.attach("g", 1)
        events = call.events()
        await anext(events)
        call.submit(make_submission(1))
        await until(lambda: world.legs)
        if how == "close":
            call.close()
        elif how == "channel":
            await peer.close()
        else:
            await first_of(peer.attach("g", 2))
        await until(lambda: world.cancelled == [(1, ())])
        assert attachments.num_legs == 0
        with contextlib.suppress(WorkerLostError):
            await drain(events)
        with pytest.raises(WorkerLostError):
            call.submit(make_submission(2))


async def test_a_stopping_server_is_a_lost_worker_to_its_gateways() -> None:
    async with contextlib.AsyncExitStack() as stack:
        address, _ = await stack.enter_async_context(serving(World()))
        async with peer_of(address) as peer:
            events = peer.attach("g", 1).events()
            await anext(events)
            await stack.aclose()
            with pytest.raises(WorkerLostError):
                await drain(events)

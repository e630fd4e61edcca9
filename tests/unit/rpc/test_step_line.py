"""A worker's steps over a connection of their own, beside a real Attach stream."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from unittest import mock

import pytest
import uvloop

from tailrace.errors import WorkerLostError
from tailrace.messages import ChoiceFinished, StepEvents
from tailrace.rpc import server, step_line
from tailrace.rpc.client import AttachCall, Peer
from tailrace.rpc.gen import worker_pb2, worker_pb2_grpc
from tailrace.rpc.server import Server, WorkerServicer
from tailrace.rpc.step_line import KEY_BYTES, LineReader
from tailrace.types import FinishReason
from tailrace.worker.attach import Attachments, Leg
from tailrace.worker.report import StepReport
from tests.helpers.values import SECRET, make_info, make_submission
from tests.helpers.waiting import until


class Handler:
    def __init__(self) -> None:
        self.legs: list[Leg] = []
        self.cancelled: list[int] = []

    def begin(self, leg: Leg) -> None:
        self.legs.append(leg)

    def cancel(self, leg: Leg, choices: tuple[int, ...]) -> None:
        self.cancelled.append(leg.id)


class Worker:
    def __init__(self) -> None:
        self.handler = Handler()
        self.attachments = Attachments(make_info(), self.handler, steps=lambda: 1)
        self.server = Server(SECRET)
        servicer = WorkerServicer(lambda: self.attachments, self.server.lines)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, self.server.grpc)
        self.server.lines.are_wanted = True

    def step(self, *tokens: int) -> None:
        """For the only leg."""
        report = StepReport()
        for token in tokens:
            report.tokens.add(self.handler.legs[0].id, 0, 3, token, None)
        self.attachments.deliver(report)

    @property
    def num_lines(self) -> int:
        return sum(line.is_open for line in self.server.lines._offered.values())


@asynccontextmanager
async def working() -> AsyncIterator[tuple[Worker, str]]:
    worker = Worker()
    port = worker.server.bind("127.0.0.1", 0)
    await worker.server.start()
    try:
        yield worker, f"127.0.0.1:{port}"
    finally:
        await worker.server.stop()


class Gateway:
    """Attaches, and notes what comes and how."""

    def __init__(self, address: str, *, wants_line: bool = True) -> None:
        self.peer = Peer(address, SECRET)
        self.call: AttachCall = self.peer.attach("g", 1)
        self.heard: list[tuple[str, StepEvents]] = []
        self.error: Exception | None = None
        self.wants_line = wants_line
        self.listening = asyncio.create_task(self.listen())

    def direct(self, event: StepEvents) -> None:
        self.heard.append(("line", event))

    async def listen(self) -> None:
        try:
            async for event in self.call.events(self.direct if self.wants_line else None):
                self.heard.append(("grpc", event))
        except Exception as error:
            self.error = error

    def tokens(self) -> list[tuple[str, int]]:
        return [(way, token) for way, event in self.heard for token in event.tokens.token_ids]

    async def close(self) -> None:
        self.call.close()
        await self.listening
        await self.peer.close()


@asynccontextmanager
async def attached(address: str, **options: Any) -> AsyncIterator[Gateway]:
    gateway = Gateway(address, **options)
    try:
        yield gateway
    finally:
        await gateway.close()


async def submitted(worker: Worker, gateway: Gateway) -> None:
    await until(lambda: gateway.heard)
    gateway.call.submit(make_submission())
    await until(lambda: worker.handler.legs)


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_once_it_is_open_everything_comes_over_it(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(everything_comes_over_it())


async def everything_comes_over_it() -> None:
    async with working() as (worker, address), attached(address) as gateway:
        await until(lambda: worker.num_lines == 1)
        await submitted(worker, gateway)
        worker.step(11)
        await until(lambda: len(gateway.tokens()) == 1)
        worker.step(12)
        await until(lambda: len(gateway.tokens()) == 2)
        assert gateway.tokens() == [("line", 11), ("line", 12)]
        assert next(way for way, _ in gateway.heard) == "grpc", "who the worker is"
        last = ChoiceFinished(worker.handler.legs[0].id, 0, FinishReason.STOP)
        worker.attachments.deliver(StepReport(finished=[last]))
        await until(lambda: gateway.heard[-1][1].finished)


async def test_a_gateway_that_does_not_want_it_gets_everything_over_grpc() -> None:
    async with working() as (worker, address), attached(address, wants_line=False) as gateway:
        await submitted(worker, gateway)
        worker.step(11)
        await until(gateway.tokens)
        assert (gateway.tokens(), worker.num_lines) == ([("grpc", 11)], 0)


async def test_where_the_port_cannot_be_reached_grpc_carries_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with working() as (worker, address):
        assert worker.server.lines._server is not None
        worker.server.lines._server.close()
        async with attached(address) as gateway:
            await submitted(worker, gateway)
            await until(lambda: "cannot be reached" in caplog.text)
            worker.step(11)
            await until(gateway.tokens)
            assert gateway.tokens() == [("grpc", 11)]


async def test_where_no_port_is_free_no_line_is_offered(caplog: pytest.LogCaptureFixture) -> None:
    with mock.patch.object(step_line.asyncio, "start_server", side_effect=OSError(98, "Address already in use")):
        async with working() as (worker, address), attached(address) as gateway:
            await submitted(worker, gateway)
            worker.step(11)
            await until(gateway.tokens)
            assert gateway.tokens() == [("grpc", 11)]
            assert not gateway.call.has_dumb_line
    assert "steps go over gRPC alone" in caplog.text


async def test_what_was_said_over_grpc_before_comes_first() -> None:
    """The line is open at once, but the gateway takes its time over the messages of the stream."""
    held = asyncio.Event()

    class Slow(Gateway):
        async def listen(self) -> None:
            async for event in self.call.events(self.direct):
                self.heard.append(("grpc", event))
                await held.wait()

    async with working() as (worker, address):
        gateway = Slow(address)
        await submitted(worker, gateway)
        await until(lambda: worker.num_lines == 1)
        worker.step(11)
        worker.step(12)
        await asyncio.sleep(0.05)
        assert [way for way, _ in gateway.heard] == ["grpc"]
        held.set()
        await until(lambda: len(gateway.tokens()) == 2)
        assert gateway.tokens() == [("line", 11), ("line", 12)]
        gateway.call.close()
        with pytest.raises(WorkerLostError):
            await gateway.listening
        await gateway.peer.close()


async def test_a_stream_that_ends_takes_its_line_along() -> None:
    async with working() as (worker, address):
        async with attached(address) as gateway:
            await until(lambda: worker.num_lines == 1)
            await submitted(worker, gateway)
        await until(lambda: not worker.server.lines._offered)
        assert worker.handler.cancelled == [worker.handler.legs[0].id]


async def test_a_line_that_breaks_takes_its_stream_along() -> None:
    async with working() as (worker, address), attached(address) as gateway:
        await until(lambda: worker.num_lines == 1)
        await submitted(worker, gateway)
        next(iter(worker.server.lines._offered.values())).close()
        await until(lambda: gateway.listening.done())
        assert "step line broke" in str(gateway.error)
        await until(lambda: worker.handler.cancelled)
        assert worker.attachments.num_legs == 0


async def test_what_the_gateway_raises_ends_the_stream_with_that_error() -> None:
    class Picky(Gateway):
        def direct(self, event: StepEvents) -> None:
            raise self.reason

    for reason, expected in ((WorkerLostError("it hangs"), "it hangs"), (ValueError("a defect"), "ValueError")):
        async with working() as (worker, address):
            gateway = Picky(address)
            gateway.reason = reason  # type: ignore[attr-defined]
            await submitted(worker, gateway)
            await until(lambda w=worker: w.num_lines == 1)
            worker.step(11)
            await until(gateway.listening.done)
            assert expected in str(gateway.error)
            await gateway.close()


async def test_a_gateway_that_does_not_read_loses_its_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PEER_LOSS_S", 0.2)
    async with working() as (worker, address), attached(address) as gateway:
        await until(lambda: worker.num_lines == 1)
        await submitted(worker, gateway)
        assert gateway.call._line is not None
        assert gateway.call._line._transport is not None
        gateway.call._line._transport.pause_reading()
        async with asyncio.timeout(10):
            while not worker.handler.cancelled:
                worker.step(*range(20_000))
                await asyncio.sleep(0.01)
        assert worker.attachments.num_legs == 0


async def test_a_line_that_lets_nothing_through_is_told_apart() -> None:
    async def swallow(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(5)
        writer.close()

    box = await asyncio.start_server(swallow, "127.0.0.1", 0)
    async with working() as (worker, address):
        worker.server.lines._port = box.sockets[0].getsockname()[1]
        async with attached(address) as gateway:
            assert not gateway.call.has_dumb_line
            await until(lambda: gateway.call.has_dumb_line)
            assert not gateway.call.uses_line, "it is open, and nothing has come"
    box.close()


async def test_a_line_is_in_use_from_what_first_comes_over_it_to_its_end() -> None:
    async with working() as (worker, address), attached(address) as gateway:
        await until(lambda: worker.num_lines == 1)
        await submitted(worker, gateway)
        worker.step(11)
        await until(gateway.tokens)
        assert gateway.call.uses_line
        next(iter(worker.server.lines._offered.values())).close()
        await until(gateway.listening.done)
        assert not gateway.call.uses_line


async def test_no_line_is_in_use_where_none_is_wanted() -> None:
    async with working() as (worker, address), attached(address, wants_line=False) as gateway:
        await submitted(worker, gateway)
        worker.step(11)
        await until(gateway.tokens)
        assert not gateway.call.uses_line


# -- strangers --------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def knock(worker: Worker, key: bytes) -> AsyncIterator[asyncio.StreamReader]:
    reader, writer = await asyncio.open_connection("127.0.0.1", worker.server.lines._port)
    writer.write(key)
    yield reader
    writer.close()


async def test_a_wrong_key_a_used_one_and_none_at_all_get_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_line, "CONNECT_S", 0.5)
    async with working() as (worker, address), attached(address):
        await until(lambda: worker.num_lines == 1)
        (used,) = worker.server.lines._offered
        for key in (b"x" * KEY_BYTES, used, b""):
            async with asyncio.timeout(5), knock(worker, key) as answer:
                assert await answer.read() == b""
        assert worker.num_lines == 1


async def test_strangers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_line, "MAX_STRANGERS", 1)
    monkeypatch.setattr(step_line, "CONNECT_S", 30)  # who is let in is not put out before the test is over
    async with working() as (worker, _), knock(worker, b"half a key") as waiting:
        await until(lambda: worker.server.lines._num_strangers == 1)
        async with asyncio.timeout(5), knock(worker, b"") as answer:
            assert await answer.read() == b""
        assert not waiting.at_eof()


# -- frames -----------------------------------------------------------------------------------------------------------


def frame(step: int, num_before: int = 0) -> bytes:
    data = worker_pb2.AttachResponse(step=step, num_before=num_before).SerializeToString()
    return len(data).to_bytes(4, "little") + data


def make_reader(taken: list[int]) -> tuple[LineReader, list[str]]:
    given_up: list[str] = []
    offer = worker_pb2.StepLine(port=1, key=b"k")
    reader = LineReader("w:1", offer, lambda message: taken.append(message.step), lambda: given_up.append("given up"))
    reader._opening.cancel()
    return reader, given_up


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
async def test_frames_may_come_in_any_pieces(size: int) -> None:
    taken: list[int] = []
    reader, given_up = make_reader(taken)
    reader.release(2)
    data = frame(1, 2) + frame(2) + frame(300) + frame(4)
    for at in range(0, len(data), size):
        reader.data_received(data[at : at + size])
    assert (taken, given_up) == ([1, 2, 300, 4], [])


async def test_a_message_that_is_too_long_is_refused_by_its_length() -> None:
    reader, given_up = make_reader([])
    reader.data_received(b"\xff" * 4)
    assert given_up == ["given up"]
    assert "are allowed" in str(reader.failure)


async def test_what_is_no_message_ends_the_stream() -> None:
    reader, given_up = make_reader([])
    reader.release(1)
    reader.data_received(b"\x02\0\0\0\xff\xff")
    assert given_up == ["given up"]
    assert "DecodeError" in str(reader.failure)

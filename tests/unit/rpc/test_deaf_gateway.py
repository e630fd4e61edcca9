"""A gateway that attaches and does not read, over real gRPC."""

import asyncio
from typing import Any

import grpc
import pytest

from tailrace.kv.events import KVEvent, KVEventKind
from tailrace.messages import Submission
from tailrace.rpc import convert, server
from tailrace.rpc.auth import AUTH_HEADER, control_token
from tailrace.rpc.gen import worker_pb2, worker_pb2_grpc
from tailrace.worker.attach import Attachments, Leg
from tailrace.worker.report import StepReport
from tests.helpers.values import SECRET, make_info, make_submission


class Handler:
    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.cancelled = asyncio.Event()

    def begin(self, leg: Leg) -> None:
        self.began.set()

    def cancel(self, leg: Leg, choices: tuple[int, ...]) -> None:
        self.cancelled.set()


async def attach_deaf(port: int, submission: Submission) -> tuple[grpc.aio.Channel, Any]:
    """A stream that submits and never reads; its connection lives and its pings are answered."""
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.http2.bdp_probe", 0)])
    call = worker_pb2_grpc.WorkerServiceStub(channel).Attach(metadata=((AUTH_HEADER, control_token(SECRET)),))
    await call.write(worker_pb2.AttachRequest(greeting=worker_pb2.Greeting(gateway_id="deaf")))
    await call.write(worker_pb2.AttachRequest(submit=convert.submission_to_proto(submission)))
    return channel, call


async def test_it_loses_its_session_and_the_server_still_serves_and_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PEER_LOSS_S", 0.3)
    handler = Handler()
    attachments = Attachments(make_info(), handler, steps=lambda: 1)
    host = server.Server(SECRET)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(server.WorkerServicer(lambda: attachments), host.grpc)
    port = host.bind("127.0.0.1", 0)
    await host.start()
    channel, _call = await attach_deaf(port, make_submission())
    async with asyncio.timeout(10):
        await handler.began.wait()
        while not handler.cancelled.is_set():
            events = [KVEvent(KVEventKind.PUBLISH, i.to_bytes(16, "big")) for i in range(20_000)]
            attachments.deliver(StepReport(kv_events=events))
            await asyncio.sleep(0.05)
    assert attachments.num_legs == 0
    other, call = await attach_deaf(port, make_submission(2))
    assert (await call.read()).info.worker_id == "w"
    await other.close()
    await channel.close()
    async with asyncio.timeout(5):
        await host.stop()

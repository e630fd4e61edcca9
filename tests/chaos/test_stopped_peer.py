"""A process that is stopped keeps its sockets open: only keepalive tells."""

import asyncio
import signal
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator

import pytest

from tailrace.errors import WorkerLostError
from tailrace.messages import StepEvents
from tailrace.rpc.client import Peer
from tests.helpers.values import SECRET

pytestmark = pytest.mark.chaos


async def drain(events: AsyncIterator[StepEvents]) -> None:
    async for _ in events:
        pass


async def test_a_stopped_worker_is_lost_within_three_seconds() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "tests.helpers.attach_server", stdout=PIPE)
    try:
        assert process.stdout is not None
        port = int(await process.stdout.readline())
        peer = Peer(f"127.0.0.1:{port}", SECRET)
        events = peer.attach("g", 1).events()
        await anext(events)
        process.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        with pytest.raises(WorkerLostError):
            await asyncio.wait_for(drain(events), 10)
        assert time.monotonic() - stopped < 3.5
        await peer.close()
    finally:
        process.kill()
        await process.wait()

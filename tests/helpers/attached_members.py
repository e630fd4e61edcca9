"""Members of a gateway without sessions, and the decode workers that they attach to."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from services.gateway.members import Members
from tailrace.messages import Load
from tailrace.types import Role
from tests.helpers.fake_members import DIGEST, SECRET, FakeNetwork, FakeWorker, worker_info
from tests.helpers.index import compact_index

BUSY = Load(num_running=1, total_blocks=100, free_blocks=99)


def names(members: Members) -> list[str]:
    return sorted(member.info.worker_id for member in members.all())


@asynccontextmanager
async def gateway(*workers: FakeWorker, reattach_s: float = 0.001) -> AsyncIterator[tuple[Members, FakeNetwork]]:
    """Members that know no address yet, on a network with these workers."""
    network = FakeNetwork(*workers)
    with network.used(reattach_s):
        members = Members(gateway_id="g", epoch=1, secret=SECRET, index=compact_index(), model_digest=DIGEST)
        try:
            yield members, network
        finally:
            await members.close()


def decode_worker(name: str = "d0", **fields: Any) -> FakeWorker:
    return FakeWorker(worker_info(name, Role.DECODE, **fields))

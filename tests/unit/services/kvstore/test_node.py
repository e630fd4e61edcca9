"""A store's node in this process: how it drains, what it pulls, how it ends."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from services.kvstore.membership import StoreMembership
from services.kvstore.node import StoreNode
from tailrace.config import KvStoreConfig
from tailrace.types import Role
from tailrace.worker.member import Identity
from tests.helpers.stores import PAGED
from tests.helpers.values import SECRET, make_layout

LAYOUT = make_layout(**PAGED)


def make_node(path: Path | None = None) -> StoreNode:
    config = KvStoreConfig(
        secret=SECRET.decode(),  # type: ignore[arg-type]
        worker_id="store",
        cpu_memory=1 << 20,
        disk_path=path,
        disk_bytes=4 << 20,
        transport="stream",
    )
    identity = Identity.draw(config, Role.KVSTORE)
    return StoreNode(config, identity, StoreMembership(config, identity, "127.0.0.1:1"))


@asynccontextmanager
async def open_node(path: Path | None = None) -> AsyncIterator[StoreNode]:
    node = make_node(path)
    try:
        await node.open(LAYOUT)
        yield node
    finally:
        await node.close()


async def test_a_store_that_drains_says_so_to_those_who_are_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailrace.worker.attach.BEAT_S", 0.01)
    monkeypatch.setattr("tailrace.worker.attach.LOAD_S", 0.0)
    async with open_node() as node:
        session = node.membership.attachments.open("g", 1)
        first = await anext(events := session.events())
        assert first.load is not None
        assert not first.load.draining
        node.drain()
        await asyncio.sleep(0)
        beat = await anext(events)
        assert beat.load is not None
        assert beat.load.draining


async def test_a_store_that_drained_before_it_knew_what_a_block_is_says_so_from_the_first() -> None:
    node = make_node()
    node.drain()
    await node.open(LAYOUT)
    assert node.membership.attachments.load.draining
    await node.close()

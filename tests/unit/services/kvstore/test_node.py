"""A store's node in this process: how it drains, what it pulls, how it ends."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from services.kvstore.membership import StoreMembership
from services.kvstore.node import MAX_PULLS, StoreNode
from tailrace.config import KvStoreConfig
from tailrace.kvstore.slab_file import Entry
from tailrace.kvstore.values import OfferedBlock
from tailrace.messages import BlockOffer, KvSource, LendDone, LendTerms, LentBlocks
from tailrace.transfer import BlockRead, PendingRead, ReadOutcome, ReadResult
from tailrace.types import Role
from tailrace.worker.member import Identity
from tests.helpers.stores import PAGED, chain_of
from tests.helpers.values import SECRET, make_layout
from tests.helpers.waiting import until

LAYOUT = make_layout(**PAGED)
A = chain_of("a", 5)


def make_node(path: Path | None = None, *, join: tuple[str, ...] = ()) -> StoreNode:
    config = KvStoreConfig(
        secret=SECRET.decode(),  # type: ignore[arg-type]
        worker_id="store",
        join=join,
        cpu_memory=1 << 20,
        disk_path=path,
        disk_bytes=4 << 20,
        transport="stream",
    )
    identity = Identity.draw(config, Role.KVSTORE)
    return StoreNode(config, identity, StoreMembership(config, identity, "127.0.0.1:1"))


class PlayedPeers:
    """An owner that lends two blocks an ask, and every read is good. `on_ask` is told what is asked for."""

    transport = "stream"

    def __init__(self, on_ask: Callable[[Sequence[bytes]], None] = lambda names: None) -> None:
        self.on_ask = on_ask
        self.asked: list[tuple[bytes, ...]] = []

    async def link(self, source: KvSource) -> "PlayedPeers":
        return self

    def read(self, reads: Sequence[BlockRead]) -> PendingRead:
        read = PendingRead(asyncio.get_running_loop())
        read.settle(ReadResult(ReadOutcome.GOOD, 0.0, 0))
        return read

    @asynccontextmanager
    async def lend(self, source: KvSource, terms: LendTerms) -> AsyncIterator[AsyncIterator[LentBlocks | LendDone]]:
        async def events() -> AsyncIterator[LentBlocks | LendDone]:
            slots = list(range(min(2, len(terms.block_hashes))))
            yield LentBlocks(0, slots, slots, slots)

        self.asked.append(terms.block_hashes)
        self.on_ask(terms.block_hashes)
        yield events()

    async def close(self) -> None:
        """Nothing is open."""


def offer_of(chain: Sequence[bytes]) -> BlockOffer:
    return BlockOffer(KvSource("w", 7, "127.0.0.1:1", b""), LAYOUT, tuple(chain))


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


async def test_a_pull_goes_on_behind_blocks_that_another_pull_brings() -> None:
    async with open_node() as node:
        assert node.storage is not None
        store = node.storage.store
        others = []

        def on_ask(names: Sequence[bytes]) -> None:
            if names == tuple(A):
                others.extend(store.reserve([OfferedBlock(name, depth, 0) for depth, name in enumerate(A[:2])]))

        node._peers = peers = PlayedPeers(on_ask)  # type: ignore[assignment]
        assert await node.offer(offer_of(A)) == tuple(A)
        await asyncio.gather(*node._pulls)
        assert peers.asked == [tuple(A), tuple(A[2:]), tuple(A[4:])]
        store.landed(others)
        assert len(store.find_prefix(A)) == len(A)


async def test_a_pull_ends_where_there_is_no_room() -> None:
    async with open_node() as node:
        assert node.storage is not None
        store = node.storage.store

        def on_ask(names: Sequence[bytes]) -> None:
            others = chain_of("others", store.memory.num_slots)
            store.reserve([OfferedBlock(name, depth, 0) for depth, name in enumerate(others)])

        node._peers = peers = PlayedPeers(on_ask)  # type: ignore[assignment]
        assert await node.offer(offer_of(A)) == tuple(A)
        await asyncio.gather(*node._pulls)
        assert peers.asked == [tuple(A)]
        assert not store.find_prefix(A)


async def test_offers_that_waited_for_the_storage_open_no_more_pulls_than_others() -> None:
    node = make_node()
    offers = [node.offer(offer_of(chain_of(f"chain{number}", 1))) for number in range(MAX_PULLS + 4)]
    taken = [wanted for wanted in await asyncio.gather(*offers) if wanted]
    assert len(taken) == MAX_PULLS
    await node.close()


async def test_a_store_that_ends_while_the_first_offer_opens_it_leaves_no_membership() -> None:
    node = make_node(join=("127.0.0.1:1",))
    node.membership.serve(node.cached)
    offer = asyncio.create_task(node.offer(offer_of(A)))
    await asyncio.sleep(0)
    await node.close()
    assert await offer == ()
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("join")]


async def test_while_a_store_closes_one_thread_alone_has_it(tmp_path: Path) -> None:
    """The disk still says that writes have ended, and a loan is closed late."""
    node = make_node(tmp_path / "slab")
    await node.open(LAYOUT)
    assert node.storage is not None
    store = node.storage.store
    assert store.disk is not None
    file, threads = store.disk.file, []
    write, pump, close = file.write, store.pump, store.close
    is_closing = threading.Event()

    def write_slowly(slot: int, entry: Entry, data: memoryview) -> int:
        threading.Event().wait(0.05)
        return write(slot, entry, data)

    def pump_noted(timeout_s: float = 0.0) -> None:
        if is_closing.is_set():
            threads.append(threading.current_thread())
        pump(timeout_s)

    def close_noted() -> None:
        is_closing.set()
        close()

    file.write = write_slowly  # type: ignore[method-assign]
    node._peers = PlayedPeers()  # type: ignore[assignment]
    await node.offer(offer_of(A))
    await asyncio.gather(*node._pulls)
    loan = node.lend(LendTerms("", 0, b"", "needer", 1, "stream", block_hashes=tuple(A)))
    await anext(loan)
    store.pump, store.close = pump_noted, close_noted  # type: ignore[method-assign]
    closing = asyncio.create_task(node.close())
    await until(lambda: threads)
    await loan.aclose()
    await closing
    assert store.counters.written == len(A)
    assert threading.current_thread() not in threads
    store.memory.check_integrity()
    assert store.memory.ledger().lent == 0

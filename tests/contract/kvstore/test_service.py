"""A real store process, real transfers: what is offered is pulled, kept, lent, and outlives the process."""

import asyncio
import os
import re
import signal
from pathlib import Path

import pytest

from tailrace.errors import InvalidRequestError, LayoutMismatchError, TailraceError, UnauthenticatedError
from tailrace.kv.events import KVEvents, Tier
from tailrace.kvstore.slab_header import peek
from tailrace.messages import BlockOffer, KvSource, LendDone, LendTerms, LentBlocks
from tailrace.rpc.client import Peer
from tests.helpers.store_process import (
    LAYOUT,
    WRITTEN,
    StoreProcess,
    Worker,
    one_life,
    refused_start,
    store_process,
    until,
    worker,
)
from tests.helpers.stores import PAGED, chain_of
from tests.helpers.values import SECRET, make_layout

A, B = chain_of("a", 6), chain_of("b", 6)
TAKEN = 'tailrace_store_blocks_total{what="taken"}'
FAILED = 'tailrace_store_blocks_total{what="failed_pulls"}'
SLOT_BYTES = LAYOUT.block_bytes


@pytest.mark.parametrize("transport", ["nixl", "stream"])
async def test_what_one_worker_offers_another_gets(tmp_path: Path, transport: str) -> None:
    async with (
        store_process(tmp_path / "slab", transport=transport) as store,
        worker("owner", transport=transport) as owner,
        worker("needer", transport=transport) as needer,
    ):
        owner.cache(A)
        assert await owner.offer(store, A) == tuple(A)
        await until(store, TAKEN, 6)
        assert await owner.offer(store, A) == ()
        assert await needer.pull(store, [*A, *B]) == 6
        await until(store, WRITTEN, 6)
        await all_given_back(store)
        assert owner.pool.ledger().lent == 0
        owner.pool.check_integrity()


async def test_what_memory_has_no_room_for_is_lent_from_disk(tmp_path: Path) -> None:
    """Eight slots of memory; 24 blocks are offered, and all of them can be had."""
    async with store_process(tmp_path / "slab", cpu_memory=64 * SLOT_BYTES) as store, worker() as peer:
        chains = [chain_of(f"c{i}", 10) for i in range(9)]
        for number, chain in enumerate(chains, start=1):
            peer.cache(chain)
            await peer.offer(store, chain)
            await until(store, WRITTEN, 10 * number)
        assert [await peer.pull(store, chain) for chain in chains] == [10] * 9
        assert await store.metric('tailrace_store_blocks_total{what="hits_disk"}') >= 26
        await all_given_back(store)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
async def test_contents_outlive_the_process(tmp_path: Path, end: int) -> None:
    async with worker() as peer:
        peer.cache(A)
        status = await one_life(tmp_path / "slab", peer, A, end)
        assert status == (0 if end == signal.SIGTERM else -signal.SIGKILL)
        async with store_process(tmp_path / "slab") as again:
            assert await peer.pull(again, A) == 6
            assert await again.metric('tailrace_store_blocks_total{what="restored"}') == 6
            assert await again.metric('tailrace_store_blocks_total{what="hits_disk"}') == 6


async def test_damage_between_two_lives_is_dropped_and_counted(tmp_path: Path) -> None:
    async with worker() as peer:
        peer.cache(A)
        await one_life(tmp_path / "slab", peer, A)
        with (tmp_path / "slab").open("r+b") as file:
            header = peek(tmp_path / "slab")
            assert header is not None
            file.seek(-SLOT_BYTES * header.num_slots, os.SEEK_END)
            file.write(b"\x55" * 64)
        async with store_process(tmp_path / "slab") as again:
            assert await peer.pull(again, A) == 0
            assert await again.metric('tailrace_store_blocks_total{what="dropped_corrupt"}') == 1
            assert await peer.pull(again, A[1:]) == 5


async def test_without_a_disk_it_is_a_store_of_memory() -> None:
    async with store_process() as store, worker() as peer:
        peer.cache(A)
        await peer.offer(store, A)
        await until(store, TAKEN, 6)
        assert await peer.pull(store, A) == 6
        assert await store.metric("tailrace_store_disk_on") == 0
        await said(store, r"memory tier: 1.0 MiB, \d+.\d of it in huge pages; (locked|not locked: .*ulimit)")


async def test_a_disk_without_room_is_said_once_and_memory_serves(tmp_path: Path) -> None:
    async with store_process(tmp_path / "slab", disk_bytes=1 << 42) as store, worker() as peer:
        peer.cache(A)
        await peer.offer(store, A)
        await until(store, TAKEN, 6)
        assert await peer.pull(store, A) == 6
        assert sum("no disk tier, the memory tier goes on alone" in line for line in store.log) == 1


async def test_a_foreign_file_stops_the_start_and_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("my only copy")
    status, said = await refused_start(tmp_path / "precious")
    assert status == 2
    assert "precious is refused: it is not a store file" in said
    assert "Traceback" not in said
    assert (tmp_path / "precious").read_text() == "my only copy"


@pytest.mark.skipif(
    Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "1", reason="this machine promises any memory"
)
async def test_more_memory_than_the_machine_has_stops_the_start(tmp_path: Path) -> None:
    status, said = await refused_start(tmp_path / "slab", cpu_memory="60TiB")
    assert (status, said.count("\n")) == (2, 1)
    assert "cpu_memory: 65970697666560 bytes cannot be had: Cannot allocate memory" in said
    assert not (tmp_path / "slab").exists()


async def test_another_size_or_another_store_stops_the_start(tmp_path: Path) -> None:
    async with store_process(tmp_path / "slab") as store, worker() as peer:
        peer.cache(A)
        await peer.offer(store, A)
        await until(store, WRITTEN, 6)
        status, said = await refused_start(tmp_path / "slab")
        assert (status, "another store has it open" in said) == (2, True)
        await store.end()
    status, said = await refused_start(tmp_path / "slab", disk_bytes="8MiB")
    assert (status, "slots, and" in said) == (2, True)


async def test_a_worker_of_another_layout_is_refused_by_the_fields(tmp_path: Path) -> None:
    other = make_layout(**PAGED, kv_dtype="bfloat16")
    async with store_process() as store, worker() as peer, worker("other", layout=other) as stranger:
        peer.cache(A)
        await peer.offer(store, A)
        with pytest.raises(LayoutMismatchError, match="kv_dtype: owner=float32 needer=bfloat16"):
            await stranger.offer(store, B)
        with pytest.raises(LayoutMismatchError, match="kv_dtype"):
            await stranger.pull(store, A)


async def test_before_the_first_offer_there_is_nothing_to_meet() -> None:
    async with store_process() as store, worker() as peer:
        with pytest.raises(TailraceError, match="learns what a block is from the first offer"):
            await peer.pull(store, A)


async def test_blocks_that_were_given_to_somebody_else_meanwhile_are_not_kept() -> None:
    async with store_process() as store, worker() as peer:
        peer.cache(A)
        peer.lender._lent = lie(peer, generations=1)  # type: ignore[method-assign]
        await peer.offer(store, A)
        await until(store, FAILED, 6)
        assert await store.metric(TAKEN) == 0
        await all_given_back(store)
        assert "could not be pulled" not in "".join(store.log), "offers are revocable: nothing is wrong"
        del peer.lender._lent
        await peer.offer(store, A)
        await until(store, TAKEN, 6)
        assert await peer.pull(store, A) == 6


async def test_a_worker_that_offers_what_it_has_not_costs_nothing() -> None:
    async with store_process() as store, worker() as peer:
        peer.cache(A)
        assert len(await peer.offer(store, B)) == 6
        await peer.offer(store, A)
        await until(store, TAKEN, 6)
        assert await store.metric(TAKEN) == 6
        await all_given_back(store)


async def test_a_worker_that_dies_after_its_offer_costs_nothing() -> None:
    async with store_process() as store, worker() as peer:
        peer.cache(A)
        await peer.offer(store, A)
        await until(store, TAKEN, 6)
        source = KvSource("gone", 1, "127.0.0.1:1", b"")
        caller = Peer(store.address, SECRET)
        assert len(await caller.offer(BlockOffer(source, LAYOUT, tuple(B)))) == 6
        await caller.close()
        assert await peer.pull(store, A) == 6
        await all_given_back(store)


async def test_a_needer_that_closes_its_stream_gives_the_blocks_back() -> None:
    async with store_process() as store, worker() as peer:
        peer.cache(A)
        await peer.offer(store, A)
        await until(store, TAKEN, 6)
        caller = Peer(store.address, SECRET)
        async with caller.lend(LendTerms("", 0, b"", "n", 1, "stream", block_hashes=tuple(A))) as events:
            assert isinstance(await anext(events), LentBlocks)
            assert isinstance(await anext(events), LendDone)
            ledger = await caller.ledger()
            assert (ledger.lent, ledger.holdings[0].holder) == (6, "n")
        await all_given_back(store)
        assert [batch.events async for batch in caller.snapshot()] == [KVEvents.published(A, Tier.CPU)]
        await caller.close()


async def test_bad_input_is_refused_by_its_field() -> None:
    async with store_process() as store, worker() as peer:
        with pytest.raises(InvalidRequestError, match="block_hashes: each has 16 bytes"):
            await peer.offer(store, [b"short"])
        with pytest.raises(InvalidRequestError, match="each may be named once"):
            await peer.offer(store, [A[0], A[0]])
        with pytest.raises(InvalidRequestError, match="tenant: at most 64 bytes"):
            await peer.offer(store, A, "t" * 65)
        stranger = Peer(store.address, b"another secret of 16")
        with pytest.raises(UnauthenticatedError):
            await stranger.ledger()
        await stranger.close()


def lie(peer: Worker, *, generations: int):  # type: ignore[no-untyped-def]
    honest = peer.lender._lent

    def lent(taken):  # type: ignore[no-untyped-def]
        told = honest(taken)
        return LentBlocks(0, told.blocks, told.addresses, [g + generations for g in told.generations])

    return lent


async def said(store: StoreProcess, pattern: str) -> None:
    async with asyncio.timeout(10):
        while not re.search(pattern, "".join(store.log)):  # noqa: ASYNC110  # another process sets no event
            await asyncio.sleep(0.02)


async def all_given_back(store) -> None:  # type: ignore[no-untyped-def]
    """Asking for the ledger also makes the store check its books."""
    peer = Peer(store.address, SECRET)
    async with asyncio.timeout(5):
        while (books := await peer.ledger()).lent or books.landing or books.quarantined:  # noqa: ASYNC110  # another process
            await asyncio.sleep(0.02)
    await peer.close()
    assert books.free + books.cached == books.total

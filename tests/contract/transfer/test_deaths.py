"""Whoever dies in the middle of a pull, the other one lives, and nothing lands where a read has settled."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from tailrace.transfer import Link, PeerEndpoints, PoolMemory, ReadOutcome, ReadResult, TransferPlane, open_transfer
from tailrace.transfer.nixl import start_nixl
from tailrace.transfer.nixl_link import NixlLink
from tests.helpers.transfer_pools import blocks_of, contents, make_options, make_pool, make_reads, peer_to_json
from tests.helpers.transfer_worker import as_lists, worker

TRANSPORTS = ["stream", "nixl"]
LARGE = {"num_blocks": 128, "block_bytes": 368_640}


@asynccontextmanager
async def needer(transport: str, pool: PoolMemory) -> AsyncIterator[TransferPlane]:
    plane = await open_transfer(pool, make_options(preference=transport))
    yield plane
    assert await plane.close()


async def pull_until_it_fails(link: Link, peer: PeerEndpoints) -> list[ReadResult]:
    reads = make_reads(peer, list(range(128)), random.Random(1).sample(range(128), 128))
    results = [await link.read(reads).wait(10)]
    while results[-1] is not None and results[-1].outcome is ReadOutcome.GOOD:
        results.append(await link.read(reads).wait(10))
    return results


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_an_owner_killed_in_a_pull_fails_it_and_the_needer_reads_elsewhere(transport: str) -> None:
    pool = make_pool(**LARGE)
    async with needer(transport, pool) as plane:
        async with worker("owner", seed=3, preference=transport, **LARGE) as owner:
            peer = await owner.meet()
            link = await plane.needer.connect(peer)
            assert (await link.read(make_reads(peer, [0], [0])).wait(10)).outcome is ReadOutcome.GOOD
            pulling = asyncio.create_task(pull_until_it_fails(link, peer))
            await asyncio.sleep(0.05)
            await owner.kill()
            last = (await pulling)[-1]
        assert last is not None
        assert last.outcome is ReadOutcome.FAILED
        assert link.broken
        async with worker("owner", seed=4, epoch=2, preference=transport, **LARGE) as restarted:
            peer = await restarted.meet()
            link = await plane.needer.connect(peer)
            assert (await link.read(make_reads(peer, [9], [0])).wait(10)).outcome is ReadOutcome.GOOD
            assert np.array_equal(blocks_of(pool)[0], contents(**LARGE, seed=4)[9])


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_needer_killed_in_a_pull_leaves_the_owner_serving(transport: str) -> None:
    async with worker("owner", seed=3, preference=transport, **LARGE) as owner:
        peer = await owner.meet()
        reads = as_lists(make_reads(peer, list(range(128)), random.Random(1).sample(range(128), 128)))
        for epoch in range(1, 4):
            async with worker("needer", epoch=epoch, preference=transport, **LARGE) as victim:
                await owner.call("meet")
                assert await victim.call("connect", peer=peer_to_json(peer)) == transport
                await victim.call("read_again_and_again", owner="owner", reads=reads)
                await asyncio.sleep(0.1 + epoch * 0.003)
        pool = make_pool(**LARGE)
        async with needer(transport, pool) as plane:
            link = await plane.needer.connect(await owner.meet())
            assert (await link.read(make_reads(peer, [9], [0])).wait(10)).outcome is ReadOutcome.GOOD
            assert np.array_equal(blocks_of(pool)[0], contents(**LARGE, seed=3)[9])


async def test_after_an_abort_a_stopped_owner_cannot_reach_blocks_of_a_settled_stream() -> None:
    pool = make_pool(**LARGE)
    async with needer("stream", pool) as plane, worker("owner", seed=3, preference="stream", **LARGE) as owner:
        peer = await owner.meet()
        link = await plane.needer.connect(peer)
        # More than can be over when the owner stops: it stops in the middle of one of them.
        pending = [link.read(make_reads(peer, list(range(128)), list(range(128)))) for _ in range(40)]
        await pending[0].wait(5)
        owner.stop()
        assert await pending[-1].wait(0.3) is None
        assert (blocks_of(pool) != 0).any()
        link.abort()
        outcomes = [(await read.wait(5)).outcome for read in pending]
        assert (outcomes[0], outcomes[-1]) == (ReadOutcome.GOOD, ReadOutcome.FAILED)
        blocks_of(pool)[:] = 7
        owner.go_on()
        await asyncio.sleep(0.5)
        assert (blocks_of(pool) == 7).all()
        link = await plane.needer.connect(peer)
        assert (await link.read(make_reads(peer, [1], [1])).wait(5)).outcome is ReadOutcome.GOOD


async def test_a_caller_that_is_cancelled_leaves_its_read_unsettled() -> None:
    async with needer("stream", make_pool()) as plane, worker("owner", seed=3, preference="stream") as owner:
        peer = await owner.meet()
        link = await plane.needer.connect(peer)
        owner.stop()
        pending = link.read(make_reads(peer, [0], [0]))
        waiting = asyncio.create_task(pending.wait())
        await asyncio.sleep(0.1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not pending.settled.cancel()
        assert not pending.settled.done()
        owner.go_on()
        assert (await pending.wait(5)).outcome is ReadOutcome.GOOD


async def test_a_nixl_read_of_a_stopped_owner_stays_unsettled_until_it_goes_on() -> None:
    """Without a first contact, so that the read has to wait for the owner: once connected, it would not."""
    pool = make_pool()
    driver = start_nixl(pool, make_options(), "reads")
    async with worker("owner", seed=3) as owner:
        peer = await owner.meet()
        owner.stop()
        loop = asyncio.get_running_loop()
        introduced = loop.create_future()
        driver.submit(lambda: loop.call_soon_threadsafe(introduced.set_result, driver.introduce(peer.nixl)))
        link = NixlLink(driver, await introduced, peer)
        pending = link.read(make_reads(peer, list(range(32)), list(range(32))))
        link.abort()
        assert await pending.wait(1) is None
        assert link.broken
        assert not driver.close(0.2)
        owner.go_on()
        await owner.meet()
        assert await pending.wait(10) is not None
        blocks_of(pool)[:] = 7
        await asyncio.sleep(0.5)
        assert (blocks_of(pool) == 7).all()
        assert driver.close()


async def test_a_stopped_owner_does_not_stop_an_attached_read() -> None:
    pool = make_pool()
    async with needer("nixl", pool) as plane, worker("owner", seed=3) as owner:
        peer = await owner.meet()
        link = await plane.needer.connect(peer)
        owner.stop()
        assert (await link.read(make_reads(peer, [1, 2], [5, 9])).wait(5)).outcome is ReadOutcome.GOOD
        assert np.array_equal(blocks_of(pool)[[5, 9]], contents(32, 4096, seed=3)[[1, 2]])


@pytest.mark.chaos
@pytest.mark.timeout(600)
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_needer_survives_fifty_owners(transport: str) -> None:
    pool = make_pool(**LARGE)
    async with needer(transport, pool) as plane:
        for epoch in range(1, 51):
            async with worker("owner", seed=3, epoch=epoch, preference=transport, **LARGE) as owner:
                peer = await owner.meet()
                link = await plane.needer.connect(peer)
                assert link.transport == transport
                pulling = asyncio.create_task(pull_until_it_fails(link, peer))
                await asyncio.sleep(random.Random(epoch).uniform(0.02, 0.1))
                await owner.kill()
                assert (await pulling)[-1] is not None


@pytest.mark.chaos
@pytest.mark.timeout(600)
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_an_owner_survives_fifty_needers(transport: str) -> None:
    async with worker("owner", seed=3, preference=transport, **LARGE) as owner:
        peer = await owner.meet()
        reads = as_lists(make_reads(peer, list(range(128)), random.Random(1).sample(range(128), 128)))
        for epoch in range(1, 51):
            async with worker("needer", epoch=epoch, preference=transport, **LARGE) as victim:
                await owner.call("meet")
                assert await victim.call("connect", peer=peer_to_json(peer)) == transport
                await victim.call("read_again_and_again", owner="owner", reads=reads)
                await asyncio.sleep(random.Random(epoch).uniform(0.02, 0.1))
        assert owner.process.returncode is None
        await owner.meet()

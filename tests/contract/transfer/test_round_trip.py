"""Blocks travel between two processes, whole and unmixed, over each transport."""

import random

import numpy as np
import pytest

from tailrace.transfer import ReadOutcome, open_transfer
from tests.helpers.transfer_pools import blocks_of, contents, make_options, make_pool, make_reads
from tests.helpers.transfer_worker import worker

TRANSPORTS = ["stream", "nixl"]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_scattered_blocks_arrive_where_they_belong(transport: str) -> None:
    pool = make_pool(64, 23_040)
    sources = random.Random(7).sample(range(64), 40)
    targets = random.Random(8).sample(range(64), 40)
    async with worker("owner", seed=3, num_blocks=64, block_bytes=23_040, preference=transport) as owner:
        plane = await open_transfer(pool, make_options(preference=transport))
        peer = await owner.meet()
        link = await plane.needer.connect(peer)
        result = await link.read(make_reads(peer, sources, targets)).wait(10)
        assert link.transport == transport
        assert (result.outcome, result.num_bytes) == (ReadOutcome.GOOD, 40 * 23_040)
        assert link.rate.bytes_per_s > 0
        expected = np.zeros((64, 23_040), dtype=np.uint8)
        expected[targets] = contents(64, 23_040, seed=3)[sources]
        assert np.array_equal(blocks_of(pool), expected)
        assert await plane.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_block_that_was_handed_out_again_is_stale(transport: str) -> None:
    async with worker("owner", seed=3, preference=transport) as owner:
        plane = await open_transfer(make_pool(), make_options(preference=transport))
        peer = await owner.meet()
        link = await plane.needer.connect(peer)
        await owner.call("bump", blocks=[5])
        stale = await link.read(make_reads(peer, [4, 5, 6], [0, 1, 2])).wait(10)
        assert (stale.outcome, stale.message) == (
            ReadOutcome.STALE,
            "1 of 3 blocks are not what was lent; the first is block 5",
        )
        good = await link.read(make_reads(peer, [4, 6], [0, 2])).wait(10)
        assert good.outcome is ReadOutcome.GOOD
        await plane.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_an_unknown_block_fails_that_read_only(transport: str) -> None:
    async with worker("owner", seed=3, preference=transport) as owner:
        plane = await open_transfer(make_pool(), make_options(preference=transport))
        peer = await owner.meet()
        link = await plane.needer.connect(peer)
        refused = await link.read(make_reads(peer, [31, 32], [0, 1])).wait(10)
        assert refused.outcome is ReadOutcome.FAILED
        assert "pool" in refused.message
        assert not link.broken
        assert (await link.read(make_reads(peer, [31], [0])).wait(10)).outcome is ReadOutcome.GOOD
        await plane.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_many_reads_at_once_settle_each_with_its_own_blocks(transport: str) -> None:
    pool = make_pool(64)
    async with worker("owner", seed=5, num_blocks=64, preference=transport) as owner:
        plane = await open_transfer(pool, make_options(preference=transport))
        peer = await owner.meet()
        link = await plane.needer.connect(peer)
        pending = [link.read(make_reads(peer, [block], [63 - block])) for block in range(64)]
        assert {(await read.wait(10)).outcome for read in pending} == {ReadOutcome.GOOD}
        assert np.array_equal(blocks_of(pool), contents(64, 4096, seed=5)[::-1])
        await plane.close()


async def test_auto_takes_nixl_where_the_pair_proves_it_and_keeps_the_link() -> None:
    async with worker("owner", seed=3) as owner:
        plane = await open_transfer(make_pool(), make_options())
        peer = await owner.meet()
        link = await plane.needer.connect(peer)
        assert link.transport == "nixl"
        assert await plane.needer.connect(peer) is link
        plane.needer.forget("owner", 1)
        again = await plane.needer.connect(await owner.meet())
        assert again is not link
        assert (await again.read(make_reads(peer, [0], [0])).wait(10)).outcome is ReadOutcome.GOOD
        await plane.close()

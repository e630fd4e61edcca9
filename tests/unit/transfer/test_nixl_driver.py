"""The driver against an agent that does as it is told: what ends when, and what is let go of when."""

import asyncio
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable

import numpy as np
import pytest

from tailrace.errors import TransferError
from tailrace.transfer import BlockRead, PeerEndpoints, ReadOutcome
from tailrace.transfer.nixl_driver import NONCE_BYTES, AgentError, NixlDriver
from tailrace.transfer.nixl_link import NixlLink, open_nixl, why_not_one_sided
from tests.helpers.transfer_fakes import FakeAgent
from tests.helpers.transfer_pools import make_pool, make_reads
from tests.helpers.waiting import until


class Pair:
    """A driver with a fake agent that has been introduced to an owner: itself, by another name."""

    def __init__(self, agent: FakeAgent) -> None:
        self.agent = agent
        self.pool = make_pool()
        self.driver = NixlDriver(lambda: agent, self.pool)
        endpoint = self.driver.endpoint()
        self.owner = PeerEndpoints("owner", 1, 4096, 32, endpoint, None)
        self.link = NixlLink(self.driver, self.driver.introduce(endpoint), self.owner)

    def read(self, *blocks: int) -> "asyncio.Future":
        return self.link.read(make_reads(self.owner, list(blocks), list(blocks))).settled

    def lands(self, blocks: list[int]) -> None:
        """The stamps that were asked for arrive."""
        self.driver.scratch[blocks] = self.pool.stamps[blocks]


async def test_a_read_is_good_after_its_data_and_then_its_stamps_have_landed() -> None:
    pair = Pair(FakeAgent())
    settled = pair.read(3, 4, 9)
    await until(lambda: len(pair.agent.handles) == 1)
    data = pair.agent.handles[0]
    base = pair.pool.address
    assert [(d.address - base, d.num_bytes) for d in data.local] == [(3 * 4096, 2 * 4096), (9 * 4096, 4096)]
    data.state = "DONE"
    await until(lambda: len(pair.agent.handles) == 2)
    assert data.released
    stamps = pair.agent.handles[1]
    base = pair.pool.stamps_address
    assert [(d.address - base, d.num_bytes) for d in stamps.remote] == [(24, 16), (72, 8)]
    assert not settled.done()
    pair.lands([3, 4, 9])
    stamps.state = "DONE"
    assert (await settled).outcome is ReadOutcome.GOOD
    assert pair.driver.close()


async def test_stamps_that_do_not_land_are_never_taken_for_good_ones() -> None:
    pair = Pair(FakeAgent(autopilot="DONE"))
    pair.lands([5])
    assert (await pair.read(5)).outcome is ReadOutcome.STALE
    pair.driver.close()


async def test_a_failed_peer_is_removed_only_after_its_last_read_is_over() -> None:
    pair = Pair(FakeAgent())
    first, second = pair.read(1), pair.read(2)
    await until(lambda: len(pair.agent.handles) == 2)
    pair.agent.handles[0].state = "ERR"
    assert (await first).outcome is ReadOutcome.FAILED
    assert pair.link.broken
    assert (await pair.read(3)).message == "nixl read failed: lost"
    assert (pair.agent.peers, second.done()) == (["fake"], False)
    pair.agent.handles[1].state = "DONE"
    assert (await second).outcome is ReadOutcome.FAILED
    await until(lambda: pair.agent.peers == [])
    assert [handle.released for handle in pair.agent.handles] == [True, True]
    pair.driver.close()


async def test_an_aborted_read_settles_when_it_is_over_and_its_handle_is_kept_until_then() -> None:
    pair = Pair(FakeAgent())
    settled = pair.read(1)
    await until(lambda: len(pair.agent.handles) == 1)
    pair.link.abort()
    await until(lambda: pair.link.broken)
    assert not pair.driver.close(0.1)
    assert (settled.done(), pair.agent.handles[0].released, pair.agent.peers) == (False, False, ["fake"])
    pair.agent.handles[0].state = "DONE"
    assert (await settled).outcome is ReadOutcome.FAILED
    assert pair.driver.close()
    assert pair.agent.peers == []


async def test_no_progress_is_made_while_nothing_is_lent_or_read() -> None:
    pair = Pair(FakeAgent(autopilot="DONE"))
    await pair.read(1)
    await asyncio.sleep(0.05)
    assert pair.agent.num_progress == 0
    with pair.driver.progress():
        await until(lambda: pair.agent.num_progress > 10)
    seen = await at_rest(pair.agent)
    pair.driver.make_progress_for(0.1)
    await until(lambda: pair.agent.num_progress > seen + 10)
    await at_rest(pair.agent)
    pair.driver.close()


async def at_rest(agent: FakeAgent) -> int:
    """Its progress, once that has ended."""
    async with asyncio.timeout(5):
        while True:
            seen = agent.num_progress
            await asyncio.sleep(0.05)
            if agent.num_progress == seen:
                return seen


async def test_memory_is_registered_once() -> None:
    pair = Pair(FakeAgent(autopilot="DONE"))
    for block in range(20):
        await pair.read(block)
    assert len(pair.agent.registered) == 4
    assert pair.agent.registered[:2] == [(pair.pool.address, 32 * 4096), (pair.pool.stamps_address, 32 * 8)]
    pair.driver.close()


async def test_an_address_outside_the_owners_pool_is_never_posted() -> None:
    pair = Pair(FakeAgent())
    base = pair.pool.address
    for block, address in ((32, base + 32 * 4096), (1, base), (1, base + 4097)):
        result = await pair.link.read([BlockRead(block, address, 0, 0)]).settled
        assert result.outcome is ReadOutcome.FAILED
    assert pair.agent.handles == []
    assert not pair.link.broken
    pair.driver.close()


async def test_a_contact_that_takes_too_long_keeps_its_landing_row_until_the_read_is_over() -> None:
    pair = Pair(FakeAgent())
    free = len(pair.driver.free_proofs)
    with pytest.raises(TransferError, match=r"did not arrive through nixl within 0\.05 s"):
        await open_nixl(pair.driver, pair.owner, pair.owner.nixl, 0.05)
    assert len(pair.driver.free_proofs) == free - 1
    with pytest.raises(TransferError, match="still has reads in flight"):
        await open_nixl(pair.driver, pair.owner, pair.owner.nixl, 0.05)
    pair.agent.handles[0].state = "ERR"
    await until(lambda: pair.agent.peers == [])
    assert len(pair.driver.free_proofs) == free
    pair.driver.close()


async def test_a_nonce_that_arrives_wrong_is_no_proof() -> None:
    pair = Pair(FakeAgent(autopilot="DONE"))
    with pytest.raises(TransferError, match="the nonce read through nixl is not the owner's"):
        await open_nixl(pair.driver, pair.owner, pair.owner.nixl, 1)
    assert pair.link.broken
    pair.driver.close()


def proofs_of(pair: Pair, wakes: Iterable[int]) -> Callable[[], bytes]:
    """What one read after another finds at the owner."""
    counts = iter(wakes)
    return lambda: pair.owner.nixl.nonce + next(counts).to_bytes(8, sys.byteorder)


async def test_reads_that_end_at_once_prove_nothing_if_the_owner_was_awake_in_each() -> None:
    pair = Pair(FakeAgent(autopilot="DONE"))
    pair.agent.proof = proofs_of(pair, itertools.count(1, 2))
    with pytest.raises(TransferError, match="with the owner's help"):
        await open_nixl(pair.driver, pair.owner, pair.owner.nixl, 10)
    assert pair.link.broken
    pair.driver.close()


async def test_an_owner_that_is_awake_for_long_is_read_again_until_it_sleeps() -> None:
    pair = Pair(FakeAgent(autopilot="DONE"))
    pair.agent.proof = proofs_of(pair, itertools.chain([7] * 300, itertools.repeat(8)))
    link = await open_nixl(pair.driver, pair.owner, pair.owner.nixl, 10)
    assert (link.transport, link.broken) == ("nixl", False)
    pair.driver.close()


async def test_reads_that_find_the_owner_asleep_are_proof_however_slow_they_are() -> None:
    pair = Pair(FakeAgent())
    pair.agent.proof = proofs_of(pair, itertools.repeat(8))
    contact = asyncio.create_task(open_nixl(pair.driver, pair.owner, pair.owner.nixl, 10))
    for num_read in range(32):
        await until(lambda num_read=num_read: len(pair.agent.handles) == num_read + 1)
        await asyncio.sleep(0.002)
        pair.agent.handles[-1].state = "DONE"
    assert (await contact).transport == "nixl"
    pair.driver.close()


async def test_an_owner_that_never_sleeps_again_holds_a_contact_until_its_deadline() -> None:
    pair = Pair(FakeAgent(autopilot="DONE"))
    pair.agent.proof = proofs_of(pair, itertools.repeat(7))
    with pytest.raises(TransferError, match=r"fewer than 32 reads .* found the owner asleep within 0\.05 s"):
        await open_nixl(pair.driver, pair.owner, pair.owner.nixl, 0.05)
    pair.driver.close()


async def test_an_owner_that_does_not_count_its_wakes_is_no_owner_over_nixl() -> None:
    pair = Pair(FakeAgent(autopilot="DONE"))
    pair.agent.proof = proofs_of(pair, itertools.repeat(0))
    with pytest.raises(TransferError, match="does not tell when it sleeps"):
        await open_nixl(pair.driver, pair.owner, pair.owner.nixl, 1)
    pair.driver.close()


async def test_the_driver_tells_that_it_sleeps_only_while_it_leaves_its_agent_alone() -> None:
    seen: list[int] = []

    class Watched(FakeAgent):
        def progress(self) -> None:
            super().progress()
            seen.append(wakes())

    pair = Pair(Watched())

    def wakes() -> int:
        return int(pair.driver.proofs[0, NONCE_BYTES:].view(np.uint64)[0])

    with pair.driver.progress():
        await until(lambda: len(seen) > 5)
    assert {count % 2 for count in seen} == {1}
    assert len(set(seen)) == len(seen)
    await until(lambda: wakes() % 2 == 0)
    pair.driver.close()


def test_an_agent_that_cannot_be_made_is_a_transfer_error() -> None:
    def refuse() -> FakeAgent:
        raise AgentError("no device")

    with pytest.raises(TransferError, match="nixl could not start: no device"):
        NixlDriver(refuse, make_pool()).endpoint()


@pytest.mark.parametrize(
    ("ours", "theirs", "proved"),
    [((), (), False), (("mlx5_0",), (), False), (("mlx5_0",), ("mlx5_1",), False), (("mlx5_0",), ("mlx5_0",), True)],
)
def test_another_host_is_one_sided_only_through_a_shared_rdma_device(ours: tuple, theirs: tuple, proved: bool) -> None:
    driver = NixlDriver(FakeAgent, make_pool(), ours)
    owner = dataclasses.replace(driver.endpoint(), boot_id="another", rdma_devices=theirs)
    assert (why_not_one_sided(driver, owner) == "") is proved
    driver.close()

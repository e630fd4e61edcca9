"""A connected pair that moves nothing costs nothing, and a pair that does is measured."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest

from tailrace.errors import TransferError
from tailrace.transfer import ReadOutcome, open_transfer, reads
from tailrace.transfer.measure import memcpy_bytes_per_s, pull_bytes_per_s
from tests.helpers.slow_link import SlowLink
from tests.helpers.transfer_pools import make_options, make_pool, make_reads, peer_to_json
from tests.helpers.transfer_worker import WorkerProcess, worker


async def quietest_s(processes: Sequence[WorkerProcess], windows: int = 3) -> float:
    """Seconds of processor time that these used in the quietest second of some: a neighbour's load may double one
    window, a poll that spins spoils them all."""

    async def used_s() -> float:
        return sum([await process.call("cpu_s") for process in processes])

    spans = []
    for _ in range(windows):
        before = await used_s()
        await asyncio.sleep(1)
        spans.append(await used_s() - before)
    return min(spans)


@pytest.mark.parametrize("transport", ["stream", "nixl"])
async def test_an_idle_pair_uses_under_two_percent_of_a_core(transport: str) -> None:
    quick = {"preference": transport, "meeting_window_s": 0.3}
    async with worker("owner", seed=3, **quick) as owner, worker("needer", **quick) as needer:
        peer = await owner.meet()
        await owner.call("lend", transport=transport)
        assert await needer.pull(peer, make_reads(peer, [1], [2])) == ["good", ""]
        await owner.call("unlend")
        await asyncio.sleep(0.5)
        assert await quietest_s([owner, needer]) < 0.02


async def test_lending_over_nixl_costs_an_owner_under_three_percent_of_a_core() -> None:
    async with worker("owner", seed=3, preference="nixl", meeting_window_s=0.0) as owner:
        await owner.call("lend", transport="nixl")
        assert await quietest_s([owner]) < 0.03


async def test_a_pull_in_flight_from_a_stopped_owner_waits_without_spinning() -> None:
    """Over a stream: by cross-memory attach an owner's blocks are read whether it runs or not."""
    async with worker("owner", seed=3, preference="stream") as owner, worker("needer", preference="stream") as needer:
        peer = await owner.meet()
        await needer.call("connect", peer=peer_to_json(peer))
        owner.stop()
        await needer.start_read("pull", peer, make_reads(peer, [1], [2]))
        before = await needer.call("cpu_s")
        assert await needer.call("wait", name="pull", timeout_s=2.0) is None
        assert await needer.call("cpu_s") - before < 0.1 * 2
        owner.go_on()
        assert await needer.call("wait", name="pull", timeout_s=10.0) == ["good", ""]


async def test_a_first_contact_over_nixl_with_a_stopped_owner_polls_with_sleep() -> None:
    async with worker("owner", seed=3, preference="nixl") as owner:
        peer = await owner.meet()
        owner.stop()
        async with worker("needer", preference="nixl", proof_timeout_s=2.0) as needer:
            before = await needer.call("cpu_s")
            with pytest.raises(RuntimeError, match="did not arrive through nixl"):
                await needer.call("connect", peer=peer_to_json(peer))
            used = await needer.call("cpu_s") - before
            assert used < 0.15 * 2, f"{used:.3f} s in two"
        owner.go_on()


@pytest.mark.parametrize("transport", ["stream", "nixl"])
async def test_a_lent_block_can_be_read_long_after_the_meeting(transport: str) -> None:
    async with worker("owner", seed=3, preference=transport, meeting_window_s=0.0) as owner:
        peer = await owner.meet()
        await owner.call("lend", transport=transport)
        async with worker("needer", preference=transport) as needer:
            assert await needer.call("connect", peer=peer_to_json(peer)) == transport
            await owner.call("unlend")
            assert await needer.pull(peer, make_reads(peer, [1], [2])) == ["good", ""]


@pytest.mark.parametrize("transport", ["stream", "nixl"])
async def test_a_link_is_measured_on_good_reads_only(transport: str) -> None:
    block_bytes = 65_536
    async with worker("owner", seed=3, block_bytes=block_bytes, preference=transport) as owner:
        plane = await open_transfer(make_pool(32, block_bytes), make_options(preference=transport))
        peer = await owner.meet()
        link = await plane.needer.connect(peer)
        rate = await pull_bytes_per_s(link, make_reads(peer, list(range(32)), list(range(32))), repeats=2)
        assert (rate.transport, rate.num_bytes) == (transport, 32 * block_bytes)
        assert 1e7 < rate.bytes_per_s < 1e12
        await owner.call("bump", blocks=[0])
        with pytest.raises(TransferError, match="was stale"):
            await pull_bytes_per_s(link, make_reads(peer, [0], [0]))
        await plane.close()


async def test_a_slow_link_s_rate_is_that_of_the_link_and_waiting_for_a_read_s_turn_is_none_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reads, "SAMPLE_S", 0.0)
    block_bytes = 65_536
    async with worker("owner", seed=3, block_bytes=block_bytes, preference="stream") as owner:
        plane = await open_transfer(make_pool(32, block_bytes), make_options(preference="stream"))
        peer = await owner.meet()
        assert peer.stream is not None
        async with SlowLink.to(peer.stream.port) as slow:
            behind = replace(peer, stream=replace(peer.stream, host="127.0.0.1", port=slow.port))
            link = await plane.needer.connect(behind)
            slow.delay_s = 0.02
            began = time.monotonic()
            pending = [link.read(make_reads(peer, [n, n + 1], [n, n + 1])) for n in range(0, 8, 2)]
            results = [await each.wait(20) for each in pending]
            took_s = time.monotonic() - began
            assert all(result is not None and result.outcome is ReadOutcome.GOOD for result in results)
            assert link.rate.num_samples == 4
            assert link.rate.bytes_per_s < 2 * block_bytes / slow.delay_s
            assert link.rate.bytes_per_s > 0.5 * 8 * block_bytes / took_s, "each waited for those before it"
            await plane.close()


def test_memcpy_is_measured() -> None:
    assert 1e8 < memcpy_bytes_per_s(65_536, num_blocks=16, repeats=1) < 1e12

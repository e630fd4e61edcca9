"""A real store process as a gateway sees it: who it is, what it refuses, and what it tells of its blocks."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tailrace.errors import WorkerLostError
from tailrace.kv.events import KVEventKind, Tier
from tailrace.messages import StepEvents, Submission
from tailrace.rpc.client import AttachCall, Peer
from tailrace.types import Role, SamplingParams
from tests.helpers.store_process import LAYOUT, WRITTEN, StoreProcess, one_life, store_process, until, worker
from tests.helpers.stores import chain_of
from tests.helpers.values import SECRET

MEMORY_SLOTS = (1 << 20) // LAYOUT.block_bytes
A = chain_of("a", 6)


class Gateway:
    """Listens to a store, and keeps what it was told."""

    def __init__(self, peer: Peer, call: AttachCall) -> None:
        self.peer, self.call = peer, call
        self.heard: list[StepEvents] = []
        self.told: dict[bytes, Tier] = {}
        self.num_told = 0
        self._task = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        async for event in self.call.events():
            self.heard.append(event)
            if (batch := event.kv_events) is not None:
                assert batch.first_sequence == self.num_told, "no gap and nothing twice"
                self.num_told += len(batch.events)
                for change in batch.events:
                    if change.kind is KVEventKind.PUBLISH:
                        self.told[change.block_hash] = change.tier
                    else:
                        del self.told[change.block_hash]

    async def until_heard(self, condition) -> None:  # type: ignore[no-untyped-def]
        async with asyncio.timeout(10):
            while not condition():
                if self._task.done():
                    self._task.result()
                    raise AssertionError("the store ended the stream")
                await asyncio.sleep(0.01)

    async def snapshot(self) -> tuple[dict[bytes, Tier], set[int]]:
        """What it says that it has, and the numbers of the events to come next."""
        batches = [batch async for batch in self.peer.snapshot()]
        found = {event.block_hash: event.tier for batch in batches for event in batch.events}
        return found, {batch.first_sequence for batch in batches}

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self.call.close()
        await self.peer.close()


@contextlib.asynccontextmanager
async def attached(store: StoreProcess) -> AsyncIterator[Gateway]:
    peer = Peer(store.address, SECRET)
    gateway = Gateway(peer, peer.attach("gateway", 1))
    try:
        await gateway.until_heard(lambda: gateway.heard)
        yield gateway
    finally:
        await gateway.close()


async def test_before_it_knows_what_a_block_is_nobody_attaches() -> None:
    async with store_process() as store:
        with pytest.raises(WorkerLostError, match="learns what a block is from the first offer"):
            async with attached(store):
                raise AssertionError("attached")


async def test_it_says_who_it_is_takes_no_submissions_and_never_looks_hung(tmp_path: Path) -> None:
    async with store_process(tmp_path / "slab") as store, worker() as peer:
        peer.cache(A)
        await peer.offer(store, A)
        await until(store, WRITTEN, 6)
        async with attached(store) as gateway:
            info = gateway.heard[0].info
            assert info is not None
            assert (info.worker_id, info.role, info.layout, info.address) == (
                "store",
                Role.KVSTORE,
                LAYOUT,
                store.address,
            )
            assert info.num_blocks > MEMORY_SLOTS
            tokens = list(range(20))
            gateway.call.submit(Submission(7, "r", 1, tokens, 20, SamplingParams(), (0,), 0, 10.0))
            await gateway.until_heard(lambda: any(event.failed for event in gateway.heard))
            [failed] = [each for event in gateway.heard for each in event.failed]
            assert (failed.handle, "it takes no submissions" in failed.error.message) == (7, True)
            await gateway.until_heard(lambda: len(gateway.heard) >= 4)
            steps = [event.step for event in gateway.heard]
            assert steps == sorted(set(steps)), "each message has a later one"
            load = next(event.load for event in reversed(gateway.heard) if event.load is not None)
            assert (load.total_blocks, load.cached_blocks) == (MEMORY_SLOTS, 6)


async def test_what_it_tells_is_what_it_has_on_each_tier(tmp_path: Path) -> None:
    """Blocks land in memory, are left on disk alone, and go: the disk holds fewer than are offered."""
    async with store_process(tmp_path / "slab", disk_bytes="2MiB") as store, worker() as peer:
        peer.cache(A)
        await peer.offer(store, A)
        await until(store, WRITTEN, 6)
        async with attached(store) as gateway:
            gateway.told, [gateway.num_told] = await gateway.snapshot()
            assert gateway.told == dict.fromkeys(A, Tier.CPU)
            for number in range(16):
                chain = chain_of(f"c{number}", 10)
                peer.cache(chain)
                assert len(await peer.offer(store, chain)) == 10
                await until(store, WRITTEN, 6 + 10 * (number + 1))
                if number == 8:
                    assert await peer.pull(store, A) == 6
            found, numbers = await gateway.snapshot()
            await gateway.until_heard(lambda: gateway.num_told >= max(numbers))
            assert numbers == {gateway.num_told}
            assert gateway.told == found
            assert set(found.values()) == {Tier.CPU, Tier.NVME}
            assert len(found) < 166, "some are gone"


async def test_after_a_restart_a_snapshot_says_what_the_file_has(tmp_path: Path) -> None:
    async with worker() as peer:
        peer.cache(A)
        await one_life(tmp_path / "slab", peer, A)
        async with store_process(tmp_path / "slab") as again, attached(again) as gateway:
            assert await gateway.snapshot() == (dict.fromkeys(A, Tier.NVME), {0})
            gateway.told = dict.fromkeys(A, Tier.NVME)
            assert await peer.pull(again, A) == 6
            await gateway.until_heard(lambda: gateway.told == dict.fromkeys(A, Tier.CPU))

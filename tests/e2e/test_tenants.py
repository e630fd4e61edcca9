"""What one tenant has in a store stays within its quota, whichever way a worker comes to offer it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tailrace.kv.hashing import tenant_name
from tailrace.messages import TenantUsage
from tailrace.rpc.client import Peer
from tests.helpers.cluster import MODEL, Cluster
from tests.helpers.traffic import prompt_of

pytestmark = pytest.mark.e2e
BOUND, FREE = "the salt of a bounded tenant", "the salt of one that is not"
PROMPTS = [prompt_of(70, seed) for seed in range(3)]
NUM_FULL_BLOCKS = 4
"""Of each prompt, with what is answered here."""


class Store:
    """What an operator asks of it."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self.most = TenantUsage("", 0, 0)
        """Of the bounded tenant, in each tier, whenever somebody looked."""

    async def usage(self, salt: str) -> TenantUsage:
        tenants = {each.tenant: each for each in (await self._peer.store_usage()).tenants}
        bound = tenants.get(tenant_name(BOUND), self.most)
        self.most = TenantUsage(
            "", max(self.most.memory_blocks, bound.memory_blocks), max(self.most.disk_blocks, bound.disk_blocks)
        )
        return tenants.get(tenant_name(salt), TenantUsage("", 0, 0))

    async def until(self, salt: str, *, memory_blocks: int, disk_blocks: int = 0) -> None:
        async with asyncio.timeout(30):
            found = await self.usage(salt)
            while found.memory_blocks < memory_blocks or found.disk_blocks < disk_blocks:
                await asyncio.sleep(0.005)
                found = await self.usage(salt)

    async def bound(self, *, memory_blocks: int, disk_blocks: int | None = None) -> None:
        size = (await self._peer.store_usage()).layout.block_bytes
        disk = disk_blocks * size if disk_blocks is not None else None
        await self._peer.set_quota(tenant_name(BOUND), memory_blocks * size, disk)


@contextlib.asynccontextmanager
async def opened(cluster: Cluster) -> AsyncIterator[Store]:
    """A store that knows what a block is by what somebody without a salt has asked."""
    peer = Peer(cluster.address("store"), cluster.secret.encode())
    try:
        cluster.complete(prompt_of(40, 99), max_tokens=2)
        await cluster.watch("store", lambda ledger: ledger.cached > 0)
        yield Store(peer)
    finally:
        await peer.close()


async def test_prompts_and_answers_of_a_tenant_stay_within_its_quota(small_model: Path, tmp_path: Path) -> None:
    with Cluster(small_model, max_model_len=512) as cluster:
        cluster.start(
            "kvstore", "store", cpu_memory="8MiB", disk_path=tmp_path / "slab", disk_bytes="16MiB", log_level="debug"
        )
        cluster.start_workers(store=cluster.address("store"), log_level="debug")
        async with opened(cluster) as store:
            await store.bound(memory_blocks=3, disk_blocks=5)
            for number, prompt in enumerate(PROMPTS, start=1):
                for salt in (BOUND, FREE):
                    response = cluster.post("/v1/completions", prompt=prompt, max_tokens=8, cache_salt=salt)
                    assert response.status_code == 200
                    assert response.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0, "whose was it?"
                blocks = number * NUM_FULL_BLOCKS
                await store.until(FREE, memory_blocks=blocks, disk_blocks=blocks)
                await store.until(BOUND, memory_blocks=3, disk_blocks=min(5, 3 * number))
            assert (store.most.memory_blocks, store.most.disk_blocks) == (3, 5)
            assert (await store.usage("")).memory_blocks == 2
        said = "".join(process.said() for process in cluster.processes.values())
        assert BOUND not in said
        assert BOUND not in cluster.get("/metrics").text
        assert "Traceback" not in said


async def test_what_is_offered_ahead_of_its_eviction_counts_for_its_tenant(small_model: Path) -> None:
    """A request is cancelled: what it leaves is offered only when the pool runs low."""
    with Cluster(small_model, max_model_len=448, num_blocks=32) as cluster:
        cluster.start("kvstore", "store", cpu_memory="8MiB")
        cluster.start_workers(prefill=0, store=cluster.address("store"), offer_low_water=0.5)
        async with opened(cluster) as store, cluster.client() as client:
            await store.bound(memory_blocks=2)
            stream = await client.completions.create(
                model=MODEL, prompt=PROMPTS[0], max_tokens=360, stream=True, extra_body={"cache_salt": BOUND}
            )
            await anext(aiter(stream))
            await stream.close()
            cluster.wait_until_idle(10.0)
            assert (await store.usage(BOUND)).memory_blocks == 0, "nobody has offered it yet"
            cluster.complete(prompt_of(300, 5), max_tokens=2, cache_salt=FREE)
            await store.until(FREE, memory_blocks=300 // 16)
            await store.until(BOUND, memory_blocks=2)
            assert store.most.memory_blocks == 2

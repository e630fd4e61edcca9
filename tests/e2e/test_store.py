"""A prefill worker and a store: what was computed is in the store when the request is over, and nobody waits for it."""

from pathlib import Path

import pytest

from tailrace.rpc.client import Peer
from tests.helpers.cluster import Cluster

pytestmark = pytest.mark.e2e
PROMPT = [5 + i % 90 for i in range(70)]
NUM_FULL_BLOCKS = 4


async def test_a_prompt_that_was_computed_is_in_the_store_and_outlives_it(small_model: Path, tmp_path: Path) -> None:
    disk = {"cpu_memory": "8MiB", "disk_path": tmp_path / "slab", "disk_bytes": "16MiB"}
    with Cluster(small_model, max_model_len=512) as cluster:
        cluster.start("kvstore", "store", **disk)
        cluster.start_workers(store=cluster.address("store"))
        text = cluster.complete(PROMPT, max_tokens=8)
        await cluster.watch("store", lambda ledger: ledger.cached == NUM_FULL_BLOCKS)
        kept = await hashes_in(cluster, "store")
        assert len(kept) == NUM_FULL_BLOCKS
        assert cluster.complete(PROMPT, max_tokens=8) == text
        await cluster.watch("prefill-0", lambda ledger: ledger.free + ledger.cached == ledger.total)
        assert cluster.process("store").end() == 0
        cluster.start("kvstore", "again", **disk)
        cluster.wait_until(lambda: "ready on" in cluster.process("again").said(), "the store is there again", 30.0)
        assert await hashes_in(cluster, "again") == kept
        assert cluster.complete([*PROMPT, 7], max_tokens=8)
        assert "Traceback" not in cluster.logs()


async def test_a_store_that_is_not_there_costs_a_worker_nothing(small_model: Path) -> None:
    with Cluster(small_model, max_model_len=512) as cluster:
        cluster.start_workers(store="127.0.0.1:1")
        first = cluster.complete(PROMPT, max_tokens=4)
        assert cluster.complete(PROMPT, max_tokens=4) == first
        cluster.wait_until(lambda: "the store takes no offers" in cluster.logs(), "the worker says so", 10.0)


async def hashes_in(cluster: Cluster, name: str) -> set[bytes]:
    peer = Peer(cluster.address(name), cluster.secret.encode())
    try:
        return {event.block_hash async for batch in peer.snapshot() for event in batch.events}
    finally:
        await peer.close()

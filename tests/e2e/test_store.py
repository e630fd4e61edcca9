"""A prefill worker and a store: what was computed is in the store when the request is over, and nobody waits for it."""

import asyncio
import os
import re
import signal
from pathlib import Path

import httpx
import pytest

from tailrace.cli.cluster import running_cluster
from tailrace.cli.supervisor import Death
from tailrace.config import UpConfig
from tailrace.kvstore.slab_file import ENTRY_BYTES
from tailrace.kvstore.slab_header import HEADER_BYTES, peek
from tailrace.rpc.client import Peer
from tests.helpers.cluster import Cluster
from tests.helpers.redis_servers import RedisServer

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


def test_the_gateway_knows_what_a_store_has_for_as_long_as_it_lives_and_is_not_ready_with_it_alone(
    small_model: Path, tmp_path: Path
) -> None:
    disk = {"cpu_memory": "8MiB", "disk_path": tmp_path / "slab", "disk_bytes": "16MiB"}
    with Cluster(small_model, max_model_len=512) as cluster:
        cluster.start("kvstore", "store", **disk)
        cluster.start_workers(store=cluster.address("store"))
        assert cluster.metric("tailrace_workers", role="kvstore") == 0, "it does not know what a block is"
        text = cluster.complete(PROMPT, max_tokens=8)
        cluster.wait_until(lambda: num_indexed(cluster) == NUM_FULL_BLOCKS, "the index has the prompt's blocks", 30.0)
        cluster.wait_for("prefill-0", "decode-0", "store")
        assert cluster.metric("tailrace_workers", role="kvstore") == 1
        cluster.wait_until(lambda: is_on_disk(tmp_path / "slab"), "they are on disk", 30.0)
        cluster.process("store").kill()
        cluster.wait_for("prefill-0", "decode-0")
        assert num_indexed(cluster) == 0
        assert cluster.complete(PROMPT, max_tokens=8) == text
        cluster.start("kvstore", "store", **disk)
        cluster.wait_until(lambda: num_indexed(cluster) == NUM_FULL_BLOCKS, "they are in the index again", 30.0)
        snapshots = cluster.metric("tailrace_index_snapshots_total")
        assert cluster.complete([9, *PROMPT], max_tokens=8)
        assert cluster.metric("tailrace_index_snapshots_total") == snapshots, "the events had no gap"
        assert "Traceback" not in cluster.logs()
        for name in ("prefill-0", "decode-0"):
            cluster.process(name).kill()
        cluster.wait_for("store")
        ready = cluster.get("/ready")
        assert (ready.status_code, ready.json()["reasons"]) == (503, ["no decode worker is attached"])
        assert cluster.post("/v1/completions", prompt=PROMPT, max_tokens=2).status_code == 503


@pytest.mark.chaos
async def test_a_cluster_started_with_a_store_starts_it_again_when_it_dies(small_model: Path, tmp_path: Path) -> None:
    config = UpConfig(
        model=str(small_model),
        port=0,
        max_model_len=512,
        num_blocks=64,
        threads=1,
        pin_cores=False,
        store_memory="8MiB",
        store_disk=tmp_path / "slab",
        store_disk_size="16MiB",
    )
    async with running_cluster(config, small_model, Silent()) as cluster, httpx.AsyncClient(trust_env=False) as client:

        async def num_stored() -> int:
            text = (await client.get(f"{cluster.base_url}/metrics")).text
            found = re.search(r'^tailrace_index_blocks{.*role="kvstore".*} (\S+)$', text, re.MULTILINE)
            return int(float(found[1])) if found else 0

        async def until_stored(number: int) -> None:
            async with asyncio.timeout(30):
                while await num_stored() != number:  # noqa: ASYNC110 - another process: nothing to wait on
                    await asyncio.sleep(0.02)

        body = {"model": str(small_model), "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
        answer = await client.post(f"{cluster.api_url}/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        await until_stored(NUM_FULL_BLOCKS)
        async with asyncio.timeout(30):
            while not is_on_disk(tmp_path / "slab"):  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.02)
        killed = cluster.supervisor.pids["kvstore"]
        os.kill(killed, signal.SIGKILL)
        await until_stored(0)
        await until_stored(NUM_FULL_BLOCKS)
        assert cluster.supervisor.pids["kvstore"] != killed


def test_a_store_is_found_in_redis_and_leaves_with_its_blocks(small_model: Path, tmp_path: Path) -> None:
    with (
        RedisServer() as redis,
        Cluster(small_model, gateway={"redis": redis.url}, max_model_len=512, redis=redis.url) as cluster,
    ):
        cluster.start("kvstore", "store", cpu_memory="8MiB", redis=redis.url, join="")
        cluster.start_workers(store=cluster.address("store"), join="")
        cluster.complete(PROMPT, max_tokens=4)
        cluster.wait_for("prefill-0", "decode-0", "store")
        cluster.wait_until(lambda: num_indexed(cluster) == NUM_FULL_BLOCKS, "the index has the prompt's blocks", 30.0)
        assert cluster.metric("tailrace_redis_workers") == 3
        assert cluster.process("store").end() == 0
        cluster.wait_for("prefill-0", "decode-0")
        cluster.wait_until(lambda: cluster.metric("tailrace_redis_workers") == 2, "it has struck itself off", 30.0)
        assert num_indexed(cluster) == 0


class Silent:
    def line(self, name: str, text: str) -> None:
        pass

    def died(self, death: Death, pause_s: float | None) -> None:
        pass


def num_indexed(cluster: Cluster) -> int:
    return int(cluster.metric("tailrace_index_blocks", role="kvstore"))


def is_on_disk(path: Path) -> bool:
    """As the store would find it at its next start: an entry is written after its block."""
    header = peek(path)
    assert header is not None
    table = path.read_bytes()[HEADER_BYTES : HEADER_BYTES + ENTRY_BYTES * header.num_slots]
    entries = [table[at : at + ENTRY_BYTES] for at in range(0, len(table), ENTRY_BYTES)]
    return sum(any(entry) for entry in entries) == NUM_FULL_BLOCKS


async def hashes_in(cluster: Cluster, name: str) -> set[bytes]:
    peer = Peer(cluster.address(name), cluster.secret.encode())
    try:
        return {event.block_hash async for batch in peer.snapshot() for event in batch.events}
    finally:
        await peer.close()

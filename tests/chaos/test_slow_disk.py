"""A store whose disk brings one block a second, under a worker that offers many and fetches back what gave way."""

import asyncio
import re
import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from tailrace.rpc.client import Peer
from tests.helpers.cluster import Cluster
from tests.helpers.slow_disk import slow_disk
from tests.helpers.traffic import complete_all, prompt_of

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

BLOCK_BYTES = 512 << 10
PROMPTS = [prompt_of(60 + 17 * seed, seed) for seed in range(8)]
ANSWER = 120
ROOMY: dict[str, Any] = {"dtype": "float32", "num_blocks": 512, "max_model_len": 480}
TIGHT = {**ROOMY, "num_blocks": 56, "log_level": "debug"}
REPEATS = 3


async def test_a_slow_disk_costs_hits_and_nobody_waits_for_it(wide_model: Path, tmp_path: Path) -> None:
    with Cluster(wide_model, **ROOMY) as cluster:
        cluster.start_workers(prefill=0)
        expected = await complete_all(cluster, PROMPTS, max_tokens=ANSWER)
    with Cluster(wide_model, **TIGHT) as cluster:
        path = tmp_path / "slab"
        disk = {"cpu_memory": 40 * BLOCK_BYTES, "disk_path": path, "disk_bytes": "256MiB", "metrics_port": 0}
        store = cluster.start("kvstore", "store", **disk)
        cluster.start_workers(prefill=0, store=cluster.address("store"))
        with slow_disk(store.pid, tmp_path, BLOCK_BYTES):
            asking = asyncio.create_task(longest_wait_s(cluster))
            assert await complete_all(cluster, PROMPTS * REPEATS, max_tokens=ANSWER) == expected * REPEATS
            asking.cancel()
            assert await asking < 1.0, "the store answers while its disk does not"
            counted = blocks_of(store.said())
            assert counted["taken"] > 60
            assert counted["written"] < counted["taken"] / 2
            assert counted["unwritten"] > 0
            assert store.end() == 0
        assert "no time to write" in store.said()
        assert "Traceback" not in cluster.logs()
        cluster.start("kvstore", "again", **disk)
        cluster.wait_until(lambda: "ready on" in cluster.process("again").said(), "the store is there again", 30.0)
        again = cluster.process("again").said()
        assert " 0 dropped" in again
        assert " 0 blocks found" not in again


async def longest_wait_s(cluster: Cluster) -> float:
    """For an answer of the store, until it is cancelled."""
    peer = Peer(cluster.address("store"), cluster.secret.encode())
    longest = 0.0
    try:
        while True:
            began = time.monotonic()
            await peer.load()
            longest = max(longest, time.monotonic() - began)
            await asyncio.sleep(0.02)
    except asyncio.CancelledError:
        return longest
    finally:
        await peer.close()


def blocks_of(said: str) -> dict[str, float]:
    url = re.search(r"metrics on (\S+)", said)
    assert url is not None
    text = urlopen(url[1]).read().decode()
    return {
        what: float(number)
        for what, number in re.findall(r'^tailrace_store_blocks_total\{what="(\w+)"\} (\S+)$', text, re.M)
    }

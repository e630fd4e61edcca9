"""A cluster with nothing to do sleeps."""

import asyncio
from pathlib import Path

import pytest

from tests.helpers.cluster import Cluster
from tests.helpers.traffic import complete_all, prompt_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

WATCHED_S = 4.0
AFTERWARDS_S = 6.0
"""An owner drives nixl's progress for five seconds after it was met."""


async def test_an_idle_cluster_uses_under_a_tenth_of_a_core(small_model: Path, tmp_path: Path) -> None:
    """Over nixl, which would like to poll; a stream has nothing to do between reads. A store is part of it."""
    with Cluster(small_model, dtype="float32", num_blocks=512, transport="nixl") as cluster:
        disk = {"disk_path": tmp_path / "slab", "disk_bytes": "64MiB"}
        cluster.start("kvstore", "store", transport="nixl", cpu_memory="64MiB", **disk)
        cluster.start_workers(store=cluster.address("store"))
        await complete_all(cluster, [prompt_of(200, seed) for seed in range(8)], max_tokens=32)
        cluster.wait_for("prefill-0", "decode-0", "store").wait_until_idle(5.0)
        await asyncio.sleep(AFTERWARDS_S)
        for _ in range(3):  # a neighbour's load may spoil one turn; what polls spoils them all
            before = {process.name: process.cpu_s() for process in cluster.processes.values()}
            await asyncio.sleep(WATCHED_S)
            used = {p.name: (p.cpu_s() - before[p.name]) / WATCHED_S for p in cluster.processes.values()}
            if is_idle := sum(used.values()) < 0.1 and used["store"] < 0.03:
                break
        assert is_idle, used

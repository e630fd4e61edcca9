"""Gateways that die, hang or share their workers: workers let go of what was theirs, and serve the next one."""

import asyncio
import signal
from pathlib import Path

import pytest

from tests.helpers.cluster import Cluster
from tests.helpers.traffic import asking, complete_all, prompt_of

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

LONG = {"max_tokens": 1800, "ignore_eos": True, "n": 4}


def is_idle(ledger: object) -> bool:
    return ledger.free + ledger.cached == ledger.total and not ledger.holdings  # type: ignore[attr-defined]


async def test_a_gateway_dies_and_its_requests_are_let_go(small_model: Path) -> None:
    with Cluster(small_model, dtype="float32", num_blocks=2048) as cluster:
        cluster.start_workers()
        expected = cluster.complete(prompt_of(200, 1), max_tokens=24)
        async with asking(cluster, prompt=prompt_of(200, 2), **LONG) as first:
            await cluster.watch("decode-0", lambda ledger: ledger.active > 0)
            cluster.process("gateway").kill()
            assert isinstance((await asyncio.gather(first, return_exceptions=True))[0], Exception)
        for worker in ("prefill-0", "decode-0"):
            await cluster.watch(worker, is_idle, 5.0)
        cluster.start("gateway", "gateway")
        cluster.wait_until(cluster.is_up, "it is back").wait_for("prefill-0", "decode-0")
        assert cluster.complete(prompt_of(200, 1), max_tokens=24) == expected


async def test_a_gateway_hangs_and_its_requests_are_let_go(small_model: Path) -> None:
    with Cluster(small_model, dtype="float32", num_blocks=2048) as cluster:
        cluster.start_workers()
        gateway = cluster.process("gateway")
        async with asking(cluster, prompt=prompt_of(200, 2), **LONG):
            await cluster.watch("decode-0", lambda ledger: ledger.active > 0)
            gateway.signal(signal.SIGSTOP)
            try:
                for worker in ("prefill-0", "decode-0"):
                    await cluster.watch(worker, is_idle, 10.0)
            finally:
                gateway.signal(signal.SIGCONT)
        # At first it does not know that its streams are gone, and then it has none for a moment.
        body = {"prompt": prompt_of(200, 1), "max_tokens": 24}
        cluster.wait_until(lambda: cluster.post("/v1/completions", **body).status_code == 200, "it serves", 30.0)
        cluster.wait_for("prefill-0", "decode-0").wait_until_idle(5.0)


async def test_a_decode_worker_hangs_and_another_goes_on(small_model: Path) -> None:
    with Cluster(small_model, dtype="float32", num_blocks=2048) as cluster:
        cluster.start_workers(decode=2)
        prompts = [prompt_of(200, seed) for seed in range(8)]
        expected = await complete_all(cluster, prompts, max_tokens=400)
        asked = asyncio.create_task(complete_all(cluster, prompts, max_tokens=400))
        await cluster.watch("decode-0", lambda ledger: ledger.active > 0)
        hung = cluster.process("decode-0")
        hung.signal(signal.SIGSTOP)
        try:
            assert await asked == expected
        finally:
            hung.signal(signal.SIGCONT)
        cluster.wait_for("prefill-0", "decode-0", "decode-1").wait_until_idle(10.0)
        assert await complete_all(cluster, prompts, max_tokens=400) == expected


async def test_two_gateways_share_their_workers(small_model: Path) -> None:
    with Cluster(small_model, dtype="float32", num_blocks=1024) as one, one.sibling() as other:
        join = f"127.0.0.1:{one.grpc_port},127.0.0.1:{other.grpc_port}"
        one.start("prefill", "prefill-0", join=join)
        one.start("decode", "decode-0", join=join)
        for cluster in (one, other):
            cluster.wait_for("prefill-0", "decode-0")
        prompts = [prompt_of(150, seed) for seed in range(8)]
        first, second = await asyncio.gather(
            complete_all(one, prompts, max_tokens=60), complete_all(other, prompts, max_tokens=60)
        )
        assert first == second
        other.process("gateway").kill()
        assert await complete_all(one, prompts, max_tokens=60) == first
        one.wait_until_idle(5.0)

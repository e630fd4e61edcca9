"""Workers are killed in the middle of a pull: the other side lives, and every block comes back."""

import asyncio
from pathlib import Path

import pytest

from tests.helpers.cluster import Cluster
from tests.helpers.traffic import asking, complete_all, prompt_of

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

LONG = 4000
"""Tokens: 250 blocks, 128 MB."""
TIMES = 3


def start(model: Path, transport: str, **options: object) -> Cluster:
    """A prefill of many chunks, so that the pull goes on while it is computed."""
    sizes = {"num_blocks": 600, "max_model_len": 8192, "max_num_batched_tokens": 512}
    return Cluster(model, dtype="float32", transport=transport, **{**sizes, **options})


@pytest.mark.parametrize("transport", ["nixl", "stream"])
async def test_the_needer_dies_in_mid_pull_and_the_owner_lives(wide_model: Path, transport: str) -> None:
    with start(wide_model, transport) as cluster:
        cluster.start_workers()
        expected = await complete_all(cluster, [prompt_of(LONG, 0)], max_tokens=16)
        owner = cluster.process("prefill-0")
        for number in range(1, TIMES + 1):
            async with asking(cluster, prompt=prompt_of(LONG, number), max_tokens=16) as lost:
                await cluster.watch("decode-0", lambda ledger: ledger.landing > 0)
                await asyncio.sleep(0.03 * number)
                cluster.process("decode-0").kill()
                assert (await lost).status_code == 503
            # A request that is in line when there is nobody costs the owner nothing either.
            cluster.wait_for("prefill-0").wait_until_idle(10.0)
            cluster.start("decode", "decode-0")
            cluster.wait_for("prefill-0", "decode-0")
            assert await complete_all(cluster, [prompt_of(LONG, 0)], max_tokens=16) == expected
        assert owner.popen.poll() is None


@pytest.mark.parametrize("num_others", [1, 0], ids=["another prefill", "no other prefill"])
@pytest.mark.parametrize("transport", ["nixl", "stream"])
async def test_the_owner_dies_in_mid_pull_and_the_request_is_answered(
    wide_model: Path, transport: str, num_others: int
) -> None:
    with start(wide_model, transport, prefix_caching=False) as cluster:
        cluster.start_workers()
        prompts = [prompt_of(LONG, number) for number in range(TIMES)]
        expected = await complete_all(cluster, prompts, max_tokens=16)
        for name in ("prefill-1", "prefill-2", "prefill-3")[: TIMES * num_others]:
            cluster.start("prefill", name)
        cluster.wait_until(lambda: len(cluster.workers()) == 2 + TIMES * num_others, "all are there")
        for number, prompt in enumerate(prompts):
            asked = asyncio.create_task(complete_all(cluster, [prompt], max_tokens=16))
            await cluster.watch("decode-0", lambda ledger: ledger.landing > 0)
            await asyncio.sleep(0.03 * number)
            busy = [name for name, ledger in cluster.ledgers().items() if ledger.holdings and name != "decode-0"]
            assert busy, "nobody computed any more"
            for name in busy:
                cluster.process(name).kill()
            assert await asked == [expected[number]]
            cluster.wait_until_idle(10.0)
            if not num_others:
                cluster.start("prefill", "prefill-0")
                cluster.wait_for("prefill-0", "decode-0")

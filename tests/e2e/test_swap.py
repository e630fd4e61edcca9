"""Sequences that give way in a small pool come back by way of the store, with the same tokens, whatever it does."""

import asyncio
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cluster import Cluster
from tests.helpers.traffic import complete_all, prompt_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

PROMPTS = [prompt_of(60 + 17 * seed, seed) for seed in range(8)]
ANSWER = 200
ROOMY: dict[str, Any] = {"dtype": "float32", "num_blocks": 512, "max_model_len": 480}
TIGHT = {**ROOMY, "num_blocks": 40, "log_level": "debug"}


@pytest.fixture(scope="module")
def expected(small_model: Path) -> list[str]:
    """One after the other, with plenty of room."""
    with Cluster(small_model, **ROOMY) as cluster:
        cluster.start_workers(prefill=0)
        return [cluster.complete(prompt, max_tokens=ANSWER) for prompt in PROMPTS]


def num_swapped(cluster: Cluster) -> int:
    """Blocks that came back."""
    return sum(map(int, re.findall(r"(\d+) of \d+ lost blocks came back", cluster.process("decode-0").said())))


async def start(cluster: Cluster) -> None:
    """A store that knows what a block is, and a worker that has met it."""
    cluster.start("kvstore", "store", cpu_memory="64MiB")
    cluster.start_workers(prefill=0, store=cluster.address("store"))
    cluster.complete(prompt_of(64, 99), max_tokens=20)
    await cluster.watch("store", lambda ledger: ledger.cached > 0)


async def test_blocks_come_back_from_the_store_and_tokens_are_the_same(small_model: Path, expected: list[str]) -> None:
    with Cluster(small_model, **TIGHT) as cluster:
        await start(cluster)
        for _ in range(2):
            assert await complete_all(cluster, PROMPTS * 3, max_tokens=ANSWER) == expected * 3
        assert num_swapped(cluster) > 0
        cluster.wait_until_idle(12.0)
        assert "Traceback" not in cluster.logs()


@pytest.mark.chaos
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_store_that_goes_while_blocks_come_back_costs_no_token(
    small_model: Path, expected: list[str], number: signal.Signals
) -> None:
    with Cluster(small_model, **TIGHT) as cluster:
        await start(cluster)
        answers = asyncio.create_task(complete_all(cluster, PROMPTS * 6, max_tokens=ANSWER))
        while num_swapped(cluster) == 0 and not answers.done():  # noqa: ASYNC110  # another process sets no event
            await asyncio.sleep(0.005)
        assert not answers.done(), "nothing came back while answers were going on"
        cluster.process("store").signal(number)
        assert await answers == expected * 6
        cluster.process("store").kill()
        cluster.wait_until_idle(15.0)
        assert "Traceback" not in cluster.process("decode-0").said()

"""Clients that leave at any moment: every block comes back on every worker, and the next request is fine."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.cluster import Cluster
from tests.helpers.traffic import Mix, disconnect_often, prompt_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

BACK_WITHIN_S = 2.0
PROMPT = prompt_of(200, 1)


@pytest.fixture(scope="module", params=["nixl", "stream"])
def cluster(request: pytest.FixtureRequest, small_model: Path) -> Iterator[Cluster]:
    options = {"transport": request.param, "dtype": "float32", "num_blocks": 1024, "max_num_batched_tokens": 128}
    with Cluster(small_model, **options) as cluster:
        yield cluster.start_workers()


async def test_two_hundred_disconnects_cost_no_block(cluster: Cluster) -> None:
    expected = cluster.complete(PROMPT, max_tokens=32)
    answered = await disconnect_often(cluster, 200, seed=5, mix=Mix())
    assert answered < 190, "nearly nobody left early: the delays are too long to test anything"
    cluster.wait_until_idle(BACK_WITHIN_S)
    assert cluster.complete(PROMPT, max_tokens=32) == expected


async def test_disconnects_from_pools_that_are_much_too_small(small_model: Path) -> None:
    """Bookings are refused, sequences are preempted, prompts wait for lent blocks: all of it may be left."""
    options = {"dtype": "float32", "num_blocks": 48, "max_model_len": 640, "max_num_batched_tokens": 64}
    with Cluster(small_model, **options) as cluster:
        cluster.start_workers()
        expected = cluster.complete(PROMPT, max_tokens=32)
        answered = await disconnect_often(cluster, 150, seed=6, mix=Mix(longest_prompt=400, longest_stay_s=0.6))
        assert answered < 145
        assert cluster.metric("tailrace_replays_total") > 0, "no booking was refused: the pools are not small"
        ledgers = cluster.wait_until_idle(BACK_WITHIN_S)
        assert {ledger.total for ledger in ledgers.values()} == {48}
        assert cluster.complete(PROMPT, max_tokens=32) == expected

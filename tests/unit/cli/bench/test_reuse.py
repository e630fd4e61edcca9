import json
import random

import httpx
import pytest

from tailrace.cli.bench.load import Asker
from tailrace.cli.bench.reuse import Asking, ReuseOptions, TierTimes, _report, comes_from
from tailrace.errors import UnavailableError


@pytest.mark.parametrize(
    ("found", "tier", "is_expected"),
    [
        ({}, "", True),
        ({"worker": 16}, "", False),
        ({"worker": 64}, "worker", True),
        ({"worker": 48}, "worker", False),
        ({"cpu": 64}, "cpu", True),
        ({"cpu": 60, "worker": 4}, "cpu", True),
        ({"cpu": 32, "worker": 32}, "cpu", False),
        ({"cpu": 64}, "nvme", False),
        ({"peer": 64}, "cpu", False),
    ],
)
def test_an_answer_counts_for_a_tier_when_its_prefix_came_from_there(found: dict, tier: str, is_expected: bool):
    assert comes_from(found, tier, 64) is is_expected


class FakeApi:
    """Answers two tokens and a usage; knows every first block that it was asked for, one request long."""

    def __init__(self, tier: str) -> None:
        self.tier = tier
        self.prompts: list[list[int]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        prompt = json.loads(request.content)["prompt"]
        earlier = [asked for asked in self.prompts if asked[:64] == prompt[:64]]
        was_last = bool(self.prompts) and self.prompts[-1][:64] == prompt[:64]
        found = {"worker": 64} if was_last else {self.tier: 64} if earlier else {}
        self.prompts.append(prompt)
        usage = {"prompt_tokens": 80, "completion_tokens": 2, "tailrace": {"cached_tokens_by_tier": found}}
        chunks = [{"choices": [{"text": "a"}]}, {"choices": [{"text": "b"}]}, {"choices": [], "usage": usage}]
        return httpx.Response(200, text="".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks))


async def test_a_turn_asks_for_a_new_prompt_then_for_a_kept_prefix_twice():
    options = ReuseOptions(prefix_tokens=64, new_tokens=16, settle_s=0.0)
    api, times = FakeApi("cpu"), TierTimes()
    async with Asker("http://cluster/v1", transport=httpx.MockTransport(api)) as asker:
        asking = Asking(asker, "m", "cpu", options, times)
        await asking.turn(0, is_counted=False)
        assert times.ttft == {"miss": [], "kept": [], "hit": []}
        await asking.turn(0, is_counted=True)
        await asking.turn(1, is_counted=True)
    assert [len(prompt) for prompt in api.prompts] == [80] * 9
    assert len({tuple(prompt) for prompt in api.prompts}) == 9
    assert {arm: len(found) for arm, found in times.ttft.items()} == {"miss": 2, "kept": 1, "hit": 2}
    assert times.elsewhere == {"miss": [], "kept": [{}], "hit": []}


async def test_an_answer_that_fails_ends_the_benchmark():
    transport = httpx.MockTransport(lambda _: httpx.Response(500, text="no"))
    async with Asker("http://cluster/v1", transport=transport) as asker:
        with pytest.raises(UnavailableError, match="nvme, miss: HTTP 500"):
            await Asking(asker, "m", "nvme", ReuseOptions(), TierTimes()).turn(0, is_counted=True)


def test_ratios_are_of_medians_in_one_cluster_and_none_where_nothing_was_timed():
    draw = random.Random(3)
    cpu, nvme = TierTimes(), TierTimes()
    for at in range(5):
        cpu.add("miss", 1.0, {}, is_expected=True)
        cpu.add("hit", 0.1 + at / 1e6, {"worker": 64}, is_expected=True)
        cpu.add("kept", 0.2, {"cpu": 64}, is_expected=True)
        nvme.add("miss", 2.0, {}, is_expected=True)
        nvme.add("kept", draw.random(), {"cpu": 64}, is_expected=False)
    result = _report({}, ReuseOptions(), {"cpu": cpu, "nvme": nvme})
    assert result["miss_over_hit"] == {"cpu": 10.0, "nvme": None}
    assert result["recompute_over_tier"] == {"cpu": 5.0, "nvme": None}
    assert result["tiers"]["nvme"]["kept"]["served_from_elsewhere"] == [{"cpu": 64}] * 5

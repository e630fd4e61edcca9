"""Traffic that must not notice: workers are killed, stopped and replaced at random, and every answer is right."""

import asyncio
import random
import signal
from pathlib import Path

import httpx
import pytest

from tests.helpers.cluster import MODEL, START_S, Cluster
from tests.helpers.traffic import Mix, complete_all, disconnect_often, prompt_of

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

PROMPTS = [prompt_of(100 + 97 * seed, seed) for seed in range(12)]
ANSWER = 80
NAMES = ["prefill-0", "prefill-1", "decode-0", "decode-1"]


async def keep_asking(cluster: Cluster, expected: list[str], over: asyncio.Event, seed: int) -> tuple[int, int]:
    """Right answers and refusals. A wrong answer, or none at all, raises."""
    draw = random.Random(seed)
    counts = {200: 0, 503: 0}
    async with httpx.AsyncClient(base_url=cluster.url, trust_env=False, timeout=START_S) as client:
        while not over.is_set():
            index = draw.randrange(len(PROMPTS))
            body = {"prompt": PROMPTS[index], "max_tokens": ANSWER, "temperature": 0, "ignore_eos": True}
            answer = await client.post("/v1/completions", json={"model": MODEL, **body})
            counts[answer.status_code] += 1
            if answer.status_code == 200:
                assert answer.json()["choices"][0]["text"] == expected[index]
            else:
                await asyncio.sleep(0.2)
    return counts[200], counts[503]


async def disturb(cluster: Cluster, draw: random.Random, times: int) -> None:
    """One worker at a time, so that a pair is always left."""
    for _ in range(times):
        name = draw.choice(NAMES)
        process = cluster.process(name)
        kind = draw.choice(["kill", "stop", "end"])
        if kind == "stop":
            process.signal(signal.SIGSTOP)
            await asyncio.sleep(draw.uniform(0.2, 5.0))
            process.signal(signal.SIGCONT)
        else:
            process.signal(signal.SIGKILL if kind == "kill" else signal.SIGTERM)
            await asyncio.to_thread(process.wait)
            cluster.start("prefill" if "prefill" in name else "decode", name)
        await asyncio.to_thread(cluster.wait_for, *NAMES)
        await asyncio.sleep(draw.uniform(0.0, 1.0))


@pytest.mark.parametrize("transport", ["nixl", "stream"])
async def test_answers_are_right_whoever_dies(wide_model: Path, transport: str) -> None:
    options = {"num_blocks": 300, "max_model_len": 2048, "max_num_batched_tokens": 256}
    with Cluster(wide_model, dtype="float32", transport=transport, **options) as cluster:
        cluster.start_workers(prefill=2, decode=2)
        expected = await complete_all(cluster, PROMPTS, max_tokens=ANSWER)
        over = asyncio.Event()
        asking = [asyncio.create_task(keep_asking(cluster, expected, over, seed)) for seed in range(6)]
        await disturb(cluster, random.Random(9), 12)
        over.set()
        results = await asyncio.gather(*asking)
        assert sum(good for good, _ in results) > 20
        assert sum(refused for _, refused in results) == 0, "a pair was always there"
        cluster.wait_until_idle(10.0)
        assert await complete_all(cluster, PROMPTS, max_tokens=ANSWER) == expected


@pytest.mark.parametrize("transport", ["nixl", "stream"])
async def test_disconnects_from_large_transfers(wide_model: Path, transport: str) -> None:
    """As in tests/e2e, with blocks of half a megabyte and pools that one prompt nearly fills."""
    options = {"num_blocks": 140, "max_model_len": 2048, "max_num_batched_tokens": 256}
    with Cluster(wide_model, dtype="float32", transport=transport, **options) as cluster:
        cluster.start_workers()
        mix = Mix(longest_prompt=1800, longest_answer=100, longest_stay_s=0.8)
        for seed in range(3):
            await disconnect_often(cluster, 100, seed=seed, mix=mix)
            cluster.wait_until_idle(5.0)
        assert len(await complete_all(cluster, PROMPTS, max_tokens=ANSWER)) == len(PROMPTS)

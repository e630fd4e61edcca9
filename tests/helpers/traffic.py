"""Clients of a test cluster that leave when they like."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx

from tests.helpers.cluster import MODEL, START_S, Cluster


@dataclass(frozen=True, slots=True)
class Mix:
    """What requests are drawn from. Prompts are token ids of the tiny model's ordinary vocabulary."""

    longest_prompt: int = 600
    longest_answer: int = 200
    most_choices: int = 3
    longest_stay_s: float = 0.3
    num_prefixes: int = 4
    """Prompts begin in one of so many ways, so that some blocks are found cached."""


def prompt_of(length: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, 340) for _ in range(length)]


def draw_body(draw: random.Random, mix: Mix) -> dict[str, Any]:
    length = draw.randint(1, mix.longest_prompt)
    shared = prompt_of(mix.longest_prompt, draw.randrange(mix.num_prefixes))[: draw.randint(0, length)]
    return {
        "model": MODEL,
        "prompt": shared + prompt_of(length - len(shared), draw.randrange(1 << 30)),
        "max_tokens": draw.randint(1, mix.longest_answer),
        "n": draw.randint(1, mix.most_choices),
        "stream": draw.random() < 0.6,
        "temperature": draw.choice([0.0, 1.0]),
        "ignore_eos": draw.random() < 0.7,
    }


async def disconnect_often(cluster: Cluster, count: int, *, seed: int, mix: Mix, concurrency: int = 16) -> int:
    """Sends `count` requests and leaves each after a random moment. How many were answered in full before that."""
    draw = random.Random(seed)
    gate = asyncio.Semaphore(concurrency)
    # A connection each: what is left in the middle cannot be used again.
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=cluster.url, trust_env=False, timeout=60.0, limits=limits) as client:

        async def one(body: dict[str, Any], stay_s: float) -> bool:
            async with gate:
                return await _visit(client, body, stay_s)

        stays = [draw.uniform(0.0, mix.longest_stay_s) for _ in range(count)]
        return sum(await asyncio.gather(*(one(draw_body(draw, mix), stay) for stay in stays)))


async def _visit(client: httpx.AsyncClient, body: dict[str, Any], stay_s: float) -> bool:
    try:
        async with asyncio.timeout(stay_s), client.stream("POST", "/v1/completions", json=body) as response:
            async for _ in response.aiter_bytes():
                pass
    except TimeoutError:
        return False
    assert response.status_code in (200, 503), response.status_code
    return True


@contextlib.asynccontextmanager
async def asking(cluster: Cluster, **body: Any) -> AsyncIterator[asyncio.Task[httpx.Response]]:
    """A request that is being answered; leaving the block disconnects its client."""
    async with httpx.AsyncClient(base_url=cluster.url, trust_env=False, timeout=120.0) as client:
        task = asyncio.create_task(client.post("/v1/completions", json={"model": MODEL, **body}))
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def complete_all(cluster: Cluster, prompts: list[list[int]], **options: Any) -> list[str]:
    """All at once, greedy; the texts."""
    body = {"model": MODEL, "temperature": 0, "ignore_eos": True, **options}
    async with httpx.AsyncClient(base_url=cluster.url, trust_env=False, timeout=START_S) as client:
        posts = (client.post("/v1/completions", json={**body, "prompt": prompt}) for prompt in prompts)
        answers = await asyncio.gather(*posts)
    for answer in answers:
        assert answer.status_code == 200, answer.text
    return [answer.json()["choices"][0]["text"] for answer in answers]

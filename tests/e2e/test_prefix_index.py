"""Gateways that know what workers cache: from the workers alone, and through Redis."""

import asyncio
import contextlib
import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest

from tailrace.index.keys import KeySpace, StreamMessage
from tailrace.kv.events import KVEvents
from tailrace.messages import KvEventBatch
from tailrace.rpc.client import Peer
from tests.helpers.cluster import MODEL, Cluster
from tests.helpers.redis_servers import RedisServer
from tests.helpers.traffic import prompt_of
from tests.helpers.waiting import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

BLOCK = 16
KEYS = KeySpace("tailrace")


def cached_tokens(cluster: Cluster, prompt: list[int], **body: Any) -> int:
    """Prompt tokens that some worker did not compute."""
    answer = cluster.post("/v1/completions", prompt=prompt, max_tokens=2, temperature=0, ignore_eos=True, **body)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def start(model: Path, **gateway: Any) -> Cluster:
    return Cluster(model, dtype="float32", num_blocks=1024, gateway=gateway)


def test_gateways_without_redis_know_what_another_had_computed(small_model: Path) -> None:
    prompts = [prompt_of(20 * BLOCK, seed) for seed in range(4)]
    names = ("prefill-0", "prefill-1", "decode-0")
    late = Cluster(small_model, dtype="float32", num_blocks=1024)
    with start(small_model) as one, one.sibling() as other:
        late.secret = one.secret
        one.start_workers(prefill=2, join=",".join(f"127.0.0.1:{it.grpc_port}" for it in (one, other, late)))
        other.wait_for(*names)
        for prompt in prompts:
            assert cached_tokens(one, prompt) == 0
        # One of the two prefill workers has each prompt: by chance nobody finds the right one every time.
        wait_until_told(other, prompts)
        for prompt in prompts:
            assert cached_tokens(other, prompt) >= 19 * BLOCK, "events of the workers have told it"
        with late:
            late.wait_for(*names)
            wait_until_told(late, prompts)
            for prompt in prompts:
                assert cached_tokens(late, prompt) >= 19 * BLOCK, "their snapshots have told it"
            wait_until_links_are_told(one, late)


def wait_until_links_are_told(busy: Cluster, idle: Cluster) -> None:
    """What one gateway's requests have shown of the links from prefill to decode, another prices with."""
    seeds = iter(range(1000, 2000))

    def rates(cluster: Cluster) -> dict[str, float]:
        """By prefill worker, of those that are told: in steps of a quarter of an octave."""
        found = routed(cluster, prompt_of(20 * BLOCK, 999), "transfer_bytes_per_s")
        return {prefill: rate for prefill, rate in found.items() if abs(math.remainder(4 * math.log2(rate), 1)) < 1e-6}

    def is_told() -> bool:
        assert cached_tokens(busy, prompt_of(20 * BLOCK, next(seeds))) == 0
        return bool(rates(idle)) and rates(idle) == rates(busy)

    idle.wait_until(is_told, "it is told how fast they are", 30.0)


def is_degraded(cluster: Cluster) -> bool:
    answer = cluster.get("/ready")
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return bool(body["status"] == "degraded" and "Redis at 127.0.0.1" in body["reasons"][0])


def is_ready(cluster: Cluster) -> bool:
    return bool(cluster.get("/ready").json() == {"status": "ready", "reasons": []})


def wait_for_registrations(cluster: Cluster, count: int) -> None:
    cluster.wait_until(
        lambda: cluster.metric("tailrace_redis_workers") == count, f"{count} workers are registered", 30.0
    )


def test_workers_are_found_in_redis_which_may_come_and_go(small_model: Path) -> None:
    names = ("prefill-0", "prefill-1", "decode-0")
    prompts = [prompt_of(20 * BLOCK, seed) for seed in range(4)]
    with RedisServer() as redis, start(small_model, redis=redis.url) as one, one.sibling() as other:
        one.start_workers(prefill=2, join="", redis=redis.url)
        other.wait_for(*names)
        for cluster in (one, other):
            cluster.wait_until(lambda cluster=cluster: is_ready(cluster), "Redis is followed")
            wait_for_registrations(cluster, 3)
        for prompt in prompts:
            assert cached_tokens(one, prompt) == 0
        wait_until_told(other, prompts)
        for prompt in prompts:
            assert cached_tokens(other, prompt) >= 19 * BLOCK
        redis.kill()
        one.wait_until(lambda: is_degraded(one), "it knows that Redis is away")
        one.wait_until(lambda: one.metric("tailrace_redis_up") == 0, "so do its metrics", 10.0)
        for prompt in prompts:
            assert cached_tokens(one, prompt) >= 19 * BLOCK, "routing goes on"
        redis.start()
        one.wait_until(lambda: is_ready(one), "Redis is followed again")
        assert cached_tokens(one, prompt_of(20 * BLOCK, 99)) == 0
        wait_until_told(other, [prompt_of(20 * BLOCK, 99)])
        assert cached_tokens(other, prompt_of(20 * BLOCK, 99)) >= 19 * BLOCK
        wait_for_registrations(one, 3)
        assert one.metric("tailrace_workers_lost_total") == 0
        # A worker that dies is let go of, and its address with it.
        one.process("prefill-1").kill()
        one.wait_for("prefill-0", "decode-0")
        wait_for_registrations(one, 2)
        for prompt in prompts:
            assert one.post("/v1/completions", prompt=prompt, max_tokens=2).status_code == 200
        assert redis.url.removeprefix("redis://") in one.process("gateway").said()


def test_a_redis_that_is_wrong_is_said_and_costs_nothing(small_model: Path) -> None:
    with RedisServer() as redis:
        redis.client().set("tailrace:version", "0")
        with start(small_model, redis=f"redis://user:hunter2-hunter2@127.0.0.1:{redis.port}") as cluster:
            cluster.start_workers(redis=redis.url)
            assert cached_tokens(cluster, prompt_of(100, 1)) == 0
            cluster.wait_until(lambda: is_degraded(cluster), "it says so")
            gateway, worker = cluster.process("gateway"), cluster.process("prefill-0")
            cluster.wait_until(
                lambda: "it refuses the user or the password" in gateway.said(), "its log says why", 10.0
            )
            cluster.wait_until(lambda: "tailrace:version says '0'" in worker.said(), "the worker's log says why", 10.0)
            assert "hunter2" not in "".join(process.said() for process in cluster.processes.values())
            assert cluster.post("/v1/completions", prompt="hi", max_tokens=2).json()["model"] == MODEL


def routed(cluster: Cluster, prompt: list[int], term: str) -> dict[str, float]:
    """A term of each pair, by its prefill worker; 0 where it is not named."""
    answer = cluster.post("/debug/route", model=MODEL, prompt=prompt, max_tokens=2)
    assert answer.status_code == 200, answer.text
    return {it["prefill_id"]: it.get(term, 0) for it in answer.json()["prompts"][0]["candidates"] if it["prefill_id"]}


def wait_until_told(cluster: Cluster, prompts: list[list[int]]) -> None:
    """Of whoever has computed these, by a way of its own beside the answers."""

    def is_told() -> bool:
        return all(max(routed(cluster, prompt, "hit_blocks").values(), default=0) >= 19 for prompt in prompts)

    cluster.wait_until(is_told, "it is told who holds them", 15.0)


async def test_a_lie_in_redis_costs_time_and_no_answer(small_model: Path) -> None:
    """Somebody tells the stream of one worker's events that it holds what another has computed."""
    prompt = prompt_of(20 * BLOCK, 1)
    with RedisServer() as redis, start(small_model, redis=redis.url) as cluster:
        cluster.start_workers(prefill=2, join="", redis=redis.url)
        text = cluster.complete(prompt, max_tokens=8)
        cluster.wait_until(lambda: max(routed(cluster, prompt, "hit_blocks").values(), default=0) == 20, "told")
        [owner] = [name for name, depth in routed(cluster, prompt, "hit_blocks").items() if depth]
        liar = {"prefill-0": "prefill-1", "prefill-1": "prefill-0"}[owner]
        peer = Peer(cluster.address(owner), cluster.secret.encode())
        hashes = [event.block_hash async for batch in peer.snapshot() for event in batch.events]
        await peer.close()
        said = json.loads(redis.client().get(KEYS.worker(liar)))
        lie = StreamMessage(liar, KvEventBatch(said["epoch"], said["sequence"], KVEvents.published(hashes))).fields()
        redis.client().xadd(KEYS.stream_of(liar), dict(zip(lie[::2], lie[1::2], strict=True)))
        cluster.wait_until(lambda: routed(cluster, prompt, "hit_blocks").get(liar) == 20, "the lie is believed")
        cluster.process(owner).kill()
        cluster.wait_for(liar, "decode-0")
        assert cluster.complete(prompt, max_tokens=8) == text


async def test_a_gateway_counts_what_another_has_in_flight(small_model: Path) -> None:
    prompt = prompt_of(20 * BLOCK, 1)
    with RedisServer() as redis, start(small_model, redis=redis.url) as one, one.sibling() as other:
        one.start_workers(join="", redis=redis.url)
        other.wait_for("prefill-0", "decode-0")
        one.complete(prompt, max_tokens=2)
        idle = routed(other, prompt, "queue_s")["prefill-0"]
        worker = one.process("prefill-0")
        seen: list[float] = []

        def priced() -> bool:
            seen.append(routed(other, prompt, "queue_s").get("prefill-0", 0))
            return seen[-1] > 10 * idle

        async with one.client() as client:
            # A stopped worker is let go of after 1.5 s: it is stopped for less, and again if nothing was seen.
            for attempt in range(8):
                worker.signal(signal.SIGSTOP)
                long = prompt_of(600, 2 + attempt)
                sent = asyncio.create_task(client.completions.create(model=MODEL, prompt=long, max_tokens=2))
                with contextlib.suppress(TimeoutError):
                    await until(priced, 0.8)
                worker.signal(signal.SIGCONT)
                assert (await sent).choices
                if seen[-1] > 10 * idle:
                    break
        assert seen[-1] > 10 * idle
        other.wait_until(lambda: other.metric("tailrace_redis_gateways") == 0, "it is computed", 15.0)

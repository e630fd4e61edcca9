"""Workers come, go and die while the gateway serves."""

import json
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.helpers.cluster import MODEL, Cluster
from tests.helpers.traffic import prompt_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

PROMPT = prompt_of(100, 1)
STREAMED = {"prompt": PROMPT, "max_tokens": 1500, "ignore_eos": True, "n": 2, "seed": 11, "temperature": 0.8}


def start(model: Path) -> Cluster:
    return Cluster(model, dtype="float32", num_blocks=1024)


def assert_unready(cluster: Cluster, word: str) -> None:
    answer = cluster.get("/ready")
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) >= 1
    assert word in " ".join(answer.json()["reasons"])


def test_a_gateway_without_workers_says_so_at_once(small_model: Path) -> None:
    with start(small_model) as cluster:
        assert_unready(cluster, "decode")
        for path, body in (("completions", {"prompt": "hi"}), ("chat/completions", {"messages": [USER]})):
            for stream in (False, True):
                began = time.monotonic()
                answer = cluster.post(f"/v1/{path}", stream=stream, **body)
                assert time.monotonic() - began < 5.0
                assert answer.status_code == 503
                assert int(answer.headers["Retry-After"]) >= 1
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert cluster.get("/health").status_code == 200
        assert cluster.get("/v1/models").status_code == 200


USER = {"role": "user", "content": "hi"}


def test_workers_join_leave_die_and_are_replaced(small_model: Path) -> None:
    with start(small_model) as cluster:
        # A decode worker alone serves: it prefills by itself.
        cluster.start("decode", "decode-0")
        cluster.wait_for("decode-0")
        assert cluster.get("/ready").status_code == 200
        expected = cluster.complete(PROMPT, max_tokens=24)
        cluster.start("prefill", "prefill-0")
        cluster.wait_for("decode-0", "prefill-0")
        assert cluster.process("decode-0").end() == 0
        cluster.wait_until(lambda: cluster.get("/ready").status_code == 503, "the gateway knows", 10.0)
        assert_unready(cluster, "decode")
        cluster.start("decode", "decode-1")
        cluster.wait_for("decode-1", "prefill-0")
        assert cluster.complete(PROMPT, max_tokens=24) == expected
        # The newcomer had nothing cached: its prompt was pulled.
        assert "reads from prefill-0" in cluster.process("decode-1").said()
        cluster.process("prefill-0").kill()
        cluster.wait_for("decode-1")
        assert cluster.complete(prompt_of(90, 2), max_tokens=4)
        # The same name on another address, in another life.
        cluster.start("prefill", "prefill-0")
        cluster.wait_for("decode-1", "prefill-0")
        cluster.complete(prompt_of(90, 3), max_tokens=4)
        assert cluster.ledgers()["prefill-0"].cached > 0
        both = 'tailrace_attached_workers{steps="line"} 2.0'
        cluster.wait_until(lambda: both in cluster.get("/metrics").text, "both use a step line", 10.0)
        cluster.wait_until_idle(2.0)


@pytest.mark.chaos
def test_a_stopped_worker_is_dropped_and_comes_back(small_model: Path) -> None:
    with start(small_model) as cluster:
        cluster.start_workers()
        expected = cluster.complete(PROMPT, max_tokens=24)
        prefill = cluster.process("prefill-0")
        prefill.signal(signal.SIGSTOP)
        try:
            # Long enough to be sent to the one that does not answer.
            assert cluster.complete(prompt_of(300, 5), max_tokens=4)
            cluster.wait_for("decode-0")
        finally:
            prefill.signal(signal.SIGCONT)
        cluster.wait_for("decode-0", "prefill-0")
        assert cluster.complete(PROMPT, max_tokens=24) == expected
        cluster.wait_until_idle(5.0)


@asynccontextmanager
async def streaming(cluster: Cluster) -> AsyncIterator[AsyncIterator[str]]:
    """The data of each event."""
    async with httpx.AsyncClient(base_url=cluster.url, trust_env=False, timeout=120.0) as client:
        body = {"model": MODEL, "stream": True, **STREAMED}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            yield (line[6:] async for line in response.aiter_lines() if line.startswith("data: "))


async def kill_its_decoder(cluster: Cluster, events: AsyncIterator[str]) -> list[dict[str, Any]]:
    """After some tokens, whoever generates them dies; the rest of the events."""
    seen = [json.loads(await anext(events)) for _ in range(20)]
    [busy] = [name for name, ledger in cluster.ledgers().items() if ledger.active and "decode" in name]
    cluster.process(busy).kill()
    rest = [event async for event in events]
    return seen + [json.loads(event) if event != "[DONE]" else {"done": True} for event in rest]


def texts_of(events: list[dict[str, Any]]) -> list[str]:
    choices = [choice for event in events for choice in event.get("choices", [])]
    return ["".join(choice["text"] for choice in choices if choice["index"] == index) for index in range(2)]


async def test_a_decoder_dies_in_the_middle_and_another_goes_on_with_the_same_tokens_until_there_is_none(
    small_model: Path,
) -> None:
    with start(small_model) as cluster:
        cluster.start_workers(decode=2)
        answer = cluster.post("/v1/completions", **STREAMED).json()
        async with streaming(cluster) as stream:
            events = await kill_its_decoder(cluster, stream)
        assert events[-1] == {"done": True}
        assert texts_of(events) == [choice["text"] for choice in answer["choices"]]
        assert cluster.metric("tailrace_replays_total") >= 1
        cluster.wait_until(lambda: len(cluster.workers()) == 2, "one is gone").wait_until_idle(5.0)
        async with streaming(cluster) as stream:
            events = await kill_its_decoder(cluster, stream)
        assert {"done": True} not in events
        assert set(events[-1]["error"]) == {"message", "type", "param", "code"}
        assert not any("error" in event for event in events[:-1])
        cluster.wait_for("prefill-0").wait_until_idle(5.0)

"""Why a request went where it did: in an answer's header, and without a request at all."""

import json
from typing import Any

import pytest

from services.gateway.explain import HEADER, MAX_CANDIDATES, describe
from services.gateway.generate import HttpOptions
from tailrace.errors import UnavailableError
from tailrace.kv.events import KVEvents, Tier
from tailrace.kv.hashing import chain_seed, hash_blocks
from tailrace.messages import KvEventBatch, Load, StepEvents
from tailrace.policy.routing import CostTerms, Route
from tests.helpers.fake_members import BLOCK, LAYOUT, fake_cluster, make_request
from tests.helpers.gateway_app import MODEL, client_of, ids, make_app, saying

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"model": MODEL, "prompt": "the cat"}


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_explains_itself_when_asked(stream: bool) -> None:
    async with client_of(make_app(saying("ok"))) as client:
        plain = await client.post("/v1/completions", json=COMPLETION | {"stream": stream})
        asked = await client.post("/v1/completions", json=COMPLETION | {"stream": stream}, headers={HEADER: "1"})
    assert HEADER not in plain.headers
    (described,) = json.loads(asked.headers[HEADER])
    assert described["chosen"] == {"prefill_id": "p0", "decode_id": "d1"}
    assert described["prompt_tokens"] == len(ids("the cat"))
    assert described["num_candidates"] == len(described["candidates"]) == 4
    assert described["candidates"][0] == {
        "decode_id": "d1", "prefill_id": "p0", "queue_s": 0.0, "prefill_s": 0.25, "transfer_s": 0.01,
        "decode_load_s": 0.09, "total_s": 0.35,
    }  # fmt: skip
    totals = [candidate["total_s"] for candidate in described["candidates"]]
    assert totals == sorted(totals)


@pytest.mark.parametrize("value", ["0", "", "no", "2"])
async def test_any_other_value_asks_for_nothing(value: str) -> None:
    async with client_of(make_app(saying("ok"))) as client:
        response = await client.post("/v1/completions", json=COMPLETION, headers={HEADER: value})
    assert HEADER not in response.headers


async def test_each_prompt_has_its_own_up_to_a_limit() -> None:
    async with client_of(make_app(saying("ok"))) as client:
        body = {"model": MODEL, "prompt": ["a", "the cat", "b", "c", "d"]}
        response = await client.post("/v1/completions", json=body, headers={HEADER: "1"})
    described = json.loads(response.headers[HEADER])
    assert [each["prompt_tokens"] for each in described] == [len(ids(text)) for text in ("a", "the cat", "b", "c")]


def test_of_many_candidates_the_cheapest_are_described() -> None:
    terms = tuple(CostTerms(f"d{i}", f"p{i}", float(100 - i), 0.0, 0.0, 0.0) for i in range(100))
    described = describe(Route(terms[99], lambda: terms), 5)
    assert described["num_candidates"] == 100
    assert [each["decode_id"] for each in described["candidates"]] == [
        f"d{i}" for i in range(99, 99 - MAX_CANDIDATES, -1)
    ]
    assert len(json.dumps([described] * 4)) < 16_000, "a header's worth"


@pytest.mark.parametrize("body", [CHAT, COMPLETION], ids=["chat", "completion"])
async def test_a_dry_run_starts_nothing(body: dict[str, Any]) -> None:
    dispatcher = saying("ok")
    async with client_of(make_app(dispatcher)) as client:
        response = await client.post("/debug/route", json=body | {"cache_salt": "tenant"})
    assert response.status_code == 200, response.text
    (described,) = response.json()["prompts"]
    assert described["chosen"] == {"prefill_id": "p0", "decode_id": "d1"}
    assert described["prompt_tokens"] == len(dispatcher.routed[0].prompt_tokens)
    assert dispatcher.routed[0].cache_salt == "tenant"
    assert dispatcher.generations == []


async def test_a_dry_run_judges_bodies_as_the_endpoints_do() -> None:
    async with client_of(make_app(saying("ok"))) as client:
        bad = await client.post("/debug/route", json=CHAT | {"temperature": -1})
        assert (bad.status_code, bad.json()["error"]["param"]) == (400, "temperature")
        unknown = await client.post("/debug/route", json=COMPLETION | {"model": "nope"})
        assert unknown.status_code == 404
        for content in (b"{", b"[]", b""):
            assert (await client.post("/debug/route", content=content)).status_code == 400
        assert (await client.get("/debug/route")).status_code == 405
    refusing = saying("ok")
    refusing.refusal = UnavailableError("no decode worker is attached", retry_after_s=1)
    async with client_of(make_app(refusing)) as client:
        assert (await client.post("/debug/route", json=CHAT)).status_code == 503


async def test_a_dry_run_needs_the_key() -> None:
    app = make_app(saying("ok"), HttpOptions(api_keys=("k",)))
    async with client_of(app) as client:
        assert (await client.post("/debug/route", json=CHAT)).status_code == 401
        assert (await client.post("/debug/route", json=CHAT, headers={"Authorization": "Bearer k"})).status_code == 200


async def test_the_dispatcher_s_dry_run_and_its_choice_agree() -> None:
    async with fake_cluster(prefill=2, decode=2) as cluster:
        foreseen = cluster.dispatcher.route(make_request(range(40)))
        assert all(worker.submissions == [] for worker in (*cluster.prefills, *cluster.decodes))
        assert len(foreseen.terms) == 4
        session = await cluster.submit(range(40))
        assert session.route == foreseen
        await session.aclose()


async def test_the_fetch_and_its_sources_are_explained_by_tier():
    load = Load(total_blocks=1000, free_blocks=1000, prefill_tokens_per_s=100.0)
    prompt = list(range(400))
    hashes = hash_blocks(prompt, BLOCK, chain_seed(LAYOUT.fingerprint, "", ""))
    async with fake_cluster(stores=1, load=load) as cluster:
        for sequence, tier, part in ((0, Tier.CPU, hashes[:60]), (60, Tier.NVME, hashes[60:90])):
            await cluster.stores[0].say(StepEvents(kv_events=KvEventBatch(1, sequence, KVEvents.published(part, tier))))
        described = describe(cluster.dry_run(prompt), len(prompt))
    assert described["chosen"]["sources"] == [
        {"holder_id": "s0", "first_block": 0, "blocks_by_tier": {"cpu": 60, "nvme": 30}}
    ]
    (candidate,) = described["candidates"]
    assert (candidate["holder_id"], candidate["fetch_blocks"], candidate["fetch_disk_blocks"]) == ("s0", 90, 30)
    assert candidate["fetch_s"] > 0


@pytest.mark.parametrize("header", [{}, {"X-Session-Id": "conversation 7"}])
async def test_the_session_of_a_request_comes_with_its_header(header: dict[str, str]) -> None:
    dispatcher = saying("ok")
    async with client_of(make_app(dispatcher)) as client:
        assert (await client.post("/v1/completions", json=COMPLETION, headers=header)).status_code == 200
        long = await client.post("/v1/completions", json=COMPLETION, headers={"X-Session-Id": "x" * 257})
    assert [request.session_id for request in dispatcher.requests] == [header.get("X-Session-Id", "")]
    assert (long.status_code, long.json()["error"]["param"]) == (400, "X-Session-Id")
    assert "257 characters; at most 256" in long.json()["error"]["message"]

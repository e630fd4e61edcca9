"""Pools that are too small for what is asked: everyone waits, gives way or is refused, and the tokens are the same."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tailrace.errors import OverloadedError
from tailrace.messages import LendDone, LendTerms, LentBlocks
from tailrace.rpc.client import Peer
from tailrace.worker.cached_lending import MAX_LOAN_S
from tests.helpers.cluster import MODEL, Cluster
from tests.helpers.traffic import complete_all, prompt_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

PROMPTS = [prompt_of(40 + 37 * seed % 300, seed) for seed in range(24)]
ANSWER = 120
ROOMY = {"dtype": "float32", "num_blocks": 1024, "max_model_len": 480, "prefix_caching": False}


@pytest.fixture(scope="module")
def roomy(small_model: Path) -> Iterator[Cluster]:
    with Cluster(small_model, **ROOMY) as cluster:
        yield cluster.start_workers(prefill=0)


@pytest.fixture(scope="module")
def expected(roomy: Cluster) -> list[str]:
    """One after the other, with plenty of room."""
    return [roomy.complete(prompt, max_tokens=ANSWER) for prompt in PROMPTS]


@pytest.mark.parametrize(("transport", "num_prefill", "turns"), [("nixl", 1, 2), ("stream", 1, 1), ("auto", 0, 1)])
async def test_tokens_do_not_depend_on_room(
    small_model: Path, expected: list[str], transport: str, num_prefill: int, turns: int
) -> None:
    """24 requests of up to 29 blocks each, in pools of 40."""
    options = {**ROOMY, "num_blocks": 40, "max_num_batched_tokens": 64, "prefix_caching": True}
    with Cluster(small_model, transport=transport, **options) as cluster:
        cluster.start_workers(prefill=num_prefill)
        for _ in range(turns):
            assert await complete_all(cluster, PROMPTS, max_tokens=ANSWER) == expected
        cluster.wait_until_idle(5.0)


async def test_many_choices_in_little_room(small_model: Path, roomy: Cluster) -> None:
    """64 choices of 10 blocks each share a prompt, in a pool of 60 blocks and 8 rows; none is lost."""
    body = {"prompt": prompt_of(100, 3), "n": 64, "max_tokens": 60, "seed": 5, "temperature": 0.9, "ignore_eos": True}
    expected = roomy.post("/v1/completions", **body).json()
    with Cluster(small_model, **{**ROOMY, "num_blocks": 60}, max_num_seqs=8) as cluster:
        cluster.start_workers()
        assert cluster.post("/v1/completions", **body).json()["choices"] == expected["choices"]
        cluster.wait_until_idle(5.0)


async def test_prompts_that_fill_the_pool(small_model: Path) -> None:
    """Two cannot be held at once, on either worker: one after the other."""
    options = {"dtype": "float32", "num_blocks": 64, "max_model_len": 1024}
    with Cluster(small_model, gateway={"max_model_len": 1024}, **options) as cluster:
        cluster.start_workers()
        prompts = [prompt_of(1000, seed) for seed in range(5)]
        texts = await complete_all(cluster, prompts, max_tokens=20)
        assert [cluster.complete(prompt, max_tokens=20) for prompt in prompts] == texts
        cluster.wait_until_idle(5.0)


async def test_a_deadline_ends_a_request_and_frees_what_it_held(small_model: Path) -> None:
    with Cluster(small_model, gateway={"deadline_s": 2.0}, dtype="float32", num_blocks=1024) as cluster:
        cluster.start_workers()
        body = {"model": MODEL, "prompt": prompt_of(100, 1), "max_tokens": 1900, "n": 16, "ignore_eos": True}
        async with httpx.AsyncClient(base_url=cluster.url, trust_env=False, timeout=60.0) as client:
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(4)))
        for answer in answers:
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        cluster.wait_until_idle(5.0)
        assert cluster.complete(prompt_of(100, 1), max_tokens=4)


@pytest.mark.parametrize(("role", "num_prefill"), [("prefill", 1), ("decode", 0)])
async def test_a_needer_that_never_reads_keeps_no_blocks_from_a_request(
    small_model: Path, role: str, num_prefill: int
) -> None:
    """It holds a loan of cached blocks, which would last ten seconds; a prompt comes that needs the whole pool."""
    options = {"dtype": "float32", "num_blocks": 64, "max_model_len": 1024}
    with Cluster(small_model, gateway={"max_model_len": 1024}, **options) as cluster:
        cluster.start_workers(prefill=num_prefill)
        cluster.complete(prompt_of(500, 1), max_tokens=4)
        cluster.wait_until_idle(5.0)
        peer = Peer(cluster.address(f"{role}-0"), cluster.secret.encode())
        cached = [event.block_hash async for batch in peer.snapshot() for event in batch.events]
        async with peer.lend(LendTerms("", 0, b"", "stuck", 1, "stream", block_hashes=tuple(cached))) as events:
            lent = await anext(events)
            assert isinstance(lent, LentBlocks)
            assert len(lent.blocks) == 6
            assert isinstance(await anext(events), LendDone)
            [holding] = (await peer.ledger()).holdings
            assert (holding.holder, len(holding.blocks)) == ("stuck", 6)
            began = time.monotonic()
            text = await asyncio.to_thread(cluster.complete, prompt_of(1000, 2), max_tokens=4)
            took_s = time.monotonic() - began
            with pytest.raises(OverloadedError, match="revoked"):
                await anext(events)
        await peer.close()
        assert took_s < MAX_LOAN_S / 2
        assert cluster.complete(prompt_of(1000, 2), max_tokens=4) == text
        cluster.wait_until_idle(5.0)

"""What a decode worker computed is of use to whoever comes next: to itself, to others by hash, and to the store."""

from pathlib import Path
from typing import Any

import pytest

from tailrace.client import AsyncClient
from tailrace.messages import LendTerms, LentBlocks
from tailrace.rpc.client import Peer
from tests.helpers.cluster import Cluster
from tests.helpers.traffic import prompt_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
BLOCK = 16
PROMPT = prompt_of(70, 1)
ANSWER = 60
NUM_FULL = (len(PROMPT) + ANSWER - 1) // BLOCK
"""Of prompt and answer: the KV of the last token is never computed."""


async def answer_of(cluster: Cluster, prompt: list[int]) -> list[int]:
    async with AsyncClient(f"127.0.0.1:{cluster.grpc_port}") as client:
        done = await client.complete(prompt, max_tokens=ANSWER, temperature=0.0, ignore_eos=True)
        return list(done.token_ids)


def usage_of(cluster: Cluster, prompt: list[int]) -> dict[str, Any]:
    answer = cluster.post("/v1/completions", prompt=prompt, max_tokens=2, temperature=0, ignore_eos=True)
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["usage"])


async def test_an_answer_is_in_the_store_once_it_is_over(small_model: Path) -> None:
    with Cluster(small_model, max_model_len=512) as cluster:
        cluster.start("kvstore", "store", cpu_memory="8MiB")
        cluster.start_workers(store=cluster.address("store"))
        answer = await answer_of(cluster, PROMPT)
        await cluster.watch("store", lambda ledger: ledger.cached == NUM_FULL)
        # Asked again, all is offered again, and nothing is taken twice.
        assert await answer_of(cluster, PROMPT) == answer
        cluster.wait_until_idle(5.0)
        await cluster.watch(
            "store", lambda ledger: ledger.cached == NUM_FULL and ledger.free == ledger.total - NUM_FULL
        )
        assert "Traceback" not in cluster.logs()


async def test_the_next_turn_finds_the_answer_on_the_decode_worker_itself(small_model: Path) -> None:
    """Prompts are prefilled by the decode worker: there is no other."""
    with Cluster(small_model, dtype="float32", max_model_len=512, num_blocks=128) as cluster:
        cluster.start_workers(prefill=0)
        for num_tail in (1, BLOCK + 3):
            prompt = prompt_of(len(PROMPT), 100 + num_tail)
            first = usage_of(cluster, prompt)
            assert first["prompt_tokens_details"]["cached_tokens"] == 0
            answer = await answer_of(cluster, prompt)
            turn = [*prompt, *answer, *prompt_of(num_tail, 2)]
            usage = usage_of(cluster, turn)
            assert usage["prompt_tokens_details"]["cached_tokens"] == NUM_FULL * BLOCK
            assert usage["tailrace"]["cached_tokens_by_tier"] == {"worker": NUM_FULL * BLOCK}
        cluster.wait_until_idle(5.0)


def test_what_another_decode_worker_has_computed_is_fetched_from_it(wide_model: Path) -> None:
    """They prefill for themselves, by turns."""
    prompt, cached = prompt_of(400, 1), 24 * BLOCK
    gateway = {"routing_policy": "round-robin"}
    with Cluster(wide_model, gateway=gateway, dtype="float32", max_model_len=512, num_blocks=128) as cluster:
        cluster.start_workers(prefill=0, decode=2)
        texts, details = [], []
        for _ in range(3):
            answer = cluster.post("/v1/completions", prompt=prompt, max_tokens=8, temperature=0, ignore_eos=True)
            assert answer.status_code == 200, answer.text
            texts.append(answer.json()["choices"][0]["text"])
            usage = answer.json()["usage"]
            details.append(usage["tailrace"]["cached_tokens_by_tier"])
            assert usage["prompt_tokens_details"]["cached_tokens"] == sum(details[-1].values())
        assert texts == [texts[0]] * 3
        assert details == [{}, {"peer": cached}, {"worker": cached}]
        cluster.wait_until_idle(5.0)
        assert "Traceback" not in cluster.logs()


async def test_a_conversation_is_lent_by_its_hashes_prompt_and_answer(small_model: Path) -> None:
    with Cluster(small_model, max_model_len=512, num_blocks=128) as cluster:
        cluster.start_workers()
        await answer_of(cluster, PROMPT)
        peer = Peer(cluster.address("decode-0"), cluster.secret.encode())
        try:
            # One conversation only: its blocks are named in the order in which they were computed.
            chain = [event.block_hash async for batch in peer.snapshot() for event in batch.events]
            assert len(chain) == NUM_FULL
            terms = LendTerms("", 0, b"", "needer", 1, "stream", block_hashes=(*chain, b"?" * 16))
            async with peer.lend(terms) as events:
                lent = await anext(events)
                assert isinstance(lent, LentBlocks)
                assert len(set(lent.blocks)) == NUM_FULL
                await cluster.watch("decode-0", lambda ledger: ledger.lent == NUM_FULL)
            await cluster.watch("decode-0", lambda ledger: ledger.lent == 0)
        finally:
            await peer.close()

"""Models with windows and a store: tokens are transformers' own whatever is found where, and counts are exact."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tailrace.client import AsyncClient, Completion
from tailrace.inference import TokenChunk
from tailrace.kv.hashing import chain_seed, hash_blocks
from tailrace.kv.window import Window
from tailrace.rpc.client import Peer
from tests.helpers.cluster import MODEL, Cluster, Ledger
from tests.helpers.direct_worker import direct
from tests.helpers.teacher_forcing import Reference
from tests.helpers.tiny_model import TinySize, make_tiny_model
from tests.helpers.traffic import prompt_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
BLOCK = 16
WINDOWED, MIXED = TinySize(window=48), TinySize(window=48, num_full=1)
SPAN = Window(48, BLOCK).span
"""Blocks: 3."""
WORKERS = ("prefill-0", "decode-0")
FIRST = prompt_of(333, 1)
ANSWER = 120
COMPUTED = (len(FIRST) + ANSWER - 1) // BLOCK
"""Blocks of the first prompt and its answer: 28. The KV of the last token is never computed."""


class World:
    """A prefill worker, a decode worker, a store with a disk, and somebody who asks."""

    def __init__(self, cluster: Cluster, client: AsyncClient, model: Path, disk: Path, num_blocks: int) -> None:
        self.cluster = cluster
        self.client = client
        self.reference = Reference(model, torch.float32)
        self.storage = {"cpu_memory": "8MiB", "disk_path": disk, "disk_bytes": "16MiB"}
        self.num_blocks = num_blocks
        self.seed = 1000

    async def ask(self, prompt: list[int], count: int = ANSWER, **options: Any) -> Completion:
        """With transformers' tokens."""
        answer = await self._answer(prompt, count, **options)
        comparison = self.reference.compare("", prompt, answer.token_ids)
        assert len(answer.token_ids) == count
        assert list(comparison.actual) == list(comparison.expected)
        return answer

    async def _answer(self, prompt: list[int], count: int, **options: Any) -> Completion:
        return await self.client.complete(
            prompt, model=MODEL, temperature=0.0, max_tokens=count, ignore_eos=True, **options
        )

    async def forget(self) -> None:
        """Workers hand out all of their blocks for requests that nobody will make again: some 40 blocks each."""
        self.seed += 100
        seeds = range(self.seed, self.seed + 2 + self.num_blocks // 60)
        await asyncio.gather(*(self._answer(prompt_of(600, seed), 340) for seed in seeds))
        self.cluster.wait_until_idle(12.0)

    async def stored(self, prompt: list[int]) -> set[int]:
        """Which of a prompt's blocks the store has, once the gateway knows all that it has."""
        peer = Peer(self.cluster.address("store"), self.cluster.secret.encode())
        try:
            layout = (await peer.store_usage()).layout
            held = {event.block_hash async for batch in peer.snapshot() for event in batch.events}
        finally:
            await peer.close()
        told = lambda: self.cluster.metric("tailrace_index_blocks", role="kvstore") >= len(held)  # noqa: E731
        self.cluster.wait_until(told, "the gateway knows what the store has", 30.0)
        chain = hash_blocks(prompt, BLOCK, chain_seed(layout.fingerprint, "", ""))
        return {place for place, name in enumerate(chain) if name in held}

    async def until_stored(self, prompt: list[int], places: set[int]) -> None:
        """The store has just these blocks of a prompt."""
        stored: set[int] = set()
        self.cluster.wait_for(*WORKERS, "store")
        try:
            async with asyncio.timeout(20):
                while (stored := await self.stored(prompt)) != places:  # noqa: ASYNC110 - another process: nothing to wait on
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"the store has blocks {sorted(stored)}, not {sorted(places)}") from None

    def sources(self, prompt: list[int]) -> list[dict[str, Any]]:
        """Whom the gateway would have asked for what now."""
        answer = self.cluster.post("/debug/route", prompt=prompt, max_tokens=1)
        assert answer.status_code == 200, answer.text
        return list(answer.json()["prompts"][0]["chosen"].get("sources", ()))


@asynccontextmanager
async def world(tmp_path: Path, size: TinySize, num_blocks: int) -> AsyncIterator[World]:
    model = make_tiny_model(tmp_path / "model", size)
    # Small steps, so that computing a prompt takes several times what a fetch is taken to cost before it is measured.
    options = {"dtype": "float32", "num_blocks": num_blocks, "max_model_len": 1024, "max_num_batched_tokens": 16}
    with Cluster(model, offer_low_water=0.5, **options) as cluster:
        async with AsyncClient(f"127.0.0.1:{cluster.grpc_port}") as client:
            there = World(cluster, client, model, tmp_path / "slab", num_blocks)
            cluster.start("kvstore", "store", **there.storage)
            cluster.start_workers(store=cluster.address("store"))
            yield there
            whole(cluster.wait_until_idle(12.0))
        assert "Traceback" not in cluster.logs()


def whole(ledgers: dict[str, Ledger]) -> None:
    assert set(ledgers) == {*WORKERS, "store"}
    for books in ledgers.values():
        assert books.free + books.cached == books.total


def tail(num_blocks: int) -> set[int]:
    """What a store is offered of a chain."""
    return set(range(num_blocks - SPAN - 1, num_blocks))


async def test_of_a_prompt_its_windows_are_kept_and_fetched(tmp_path: Path) -> None:
    """Pools of 24 blocks hold less than one prompt does."""
    async with world(tmp_path, WINDOWED, num_blocks=24) as it:
        # Of the prompt and of the answer the end; nothing of what either worker had let go of.
        turn = await next_turn(it, tail(len(FIRST) // BLOCK) | tail(COMPUTED))
        await is_fetched(it, turn, "cpu", SPAN)
        await where_prompts_part(it)
        await what_is_cancelled(it)
        restart_the_store(it)
        await is_fetched(it, turn, "nvme", SPAN)


async def test_with_windows_in_some_layers_all_blocks_are_kept_and_fetched(tmp_path: Path) -> None:
    async with world(tmp_path, MIXED, num_blocks=120) as it:
        for name in WORKERS:
            said = it.cluster.process(name).said()
            assert "1 of 2 layers see 48 tokens at most, the others all: the cache keeps all tokens" in said
            assert "a sequence of 1024 tokens takes 0.5 MiB" in said
        turn = await next_turn(it, set(range(COMPUTED)))
        await is_fetched(it, turn, "cpu", COMPUTED)
        restart_the_store(it)
        await is_fetched(it, turn, "nvme", COMPUTED)


async def next_turn(it: World, stored: set[int]) -> list[int]:
    """Of a conversation, of which the store has these blocks: handed over, fetched by a worker from the other, found
    where it was."""
    first = await it.ask(FIRST)
    assert first.usage.cached_tokens == 0
    turn = [*FIRST, *first.token_ids, 7]
    await it.until_stored(turn, stored)
    address, secret = it.cluster.address, it.cluster.secret
    async with direct(address("decode-0"), secret) as decode, direct(address("prefill-0"), secret) as prefill:
        for by_tier in ({"worker": 320, "peer": 128}, {"worker": COMPUTED * BLOCK}):
            answer = await prefill.ask(turn, decode.holds(COMPUTED))
            assert it.reference.compare("", turn, [answer.token]).expected == [answer.token]
            assert answer.report.cached_by_tier == by_tier
    return turn


async def is_fetched(it: World, turn: list[int], tier: str, num_blocks: int) -> None:
    """The last so many blocks of what was computed, from this tier of the store.

    On a busy machine the first meeting of two processes may outlast a fetch's patience: then all is computed, and
    their pair is left alone for a second.
    """
    for _ in range(3):
        await it.forget()
        it.cluster.wait_until(lambda: bool(it.sources(turn)), "somebody is to be asked", 30.0)
        [source] = it.sources(turn)
        assert (source["first_block"], source["blocks_by_tier"]) == (COMPUTED - num_blocks, {tier: num_blocks})
        answer = await it.ask(turn)
        if answer.usage.cached_tokens:
            break
    assert answer.usage.cached_tokens == COMPUTED * BLOCK
    assert answer.usage.cached_by_tier == {tier: COMPUTED * BLOCK}


def restart_the_store(it: World) -> None:
    whole(it.cluster.wait_until_idle(12.0))
    assert it.cluster.process("store").end() == 0
    it.cluster.wait_for(*WORKERS)
    it.cluster.start("kvstore", "store", **it.storage)
    it.cluster.wait_for(*WORKERS, "store")


async def where_prompts_part(it: World) -> None:
    """It is known once somebody has gone on from there."""
    trunk = prompt_of(160, 2)
    for seed, found in ((11, {}), (12, {"worker": 160})):
        assert (await it.ask([*trunk, *prompt_of(100, seed)], 4)).usage.cached_by_tier == found
    await it.until_stored(trunk, {7, 8, 9})
    await it.forget()
    assert (await it.ask([*trunk, *prompt_of(100, 13)], 4)).usage.cached_by_tier == {"cpu": 160}


async def what_is_cancelled(it: World) -> None:
    """It was never over: its end is offered when blocks are scarce."""
    prompt = prompt_of(200, 3)
    whole_answer = [*prompt, *(await it.ask(prompt, 400, cache_salt="another tenant's")).token_ids]
    num_seen = 0
    async with it.client.generate(prompt, model=MODEL, temperature=0.0, max_tokens=400, ignore_eos=True) as events:
        async for event in events:
            num_seen += len(event.token_ids) if isinstance(event, TokenChunk) else 0
            if num_seen >= 150:
                break
    it.cluster.wait_until_idle(12.0)
    await it.forget()
    stored = await it.stored(whole_answer)
    depth = max(end for end in range(30) if stored.issuperset(range(end - SPAN, end)))
    # The KV of the last one that was seen may not have been computed.
    assert depth >= (len(prompt) + num_seen - 1) // BLOCK
    assert (await it.ask([*whole_answer, 7], 4)).usage.cached_by_tier == {"cpu": depth * BLOCK}

"""A client leaves at a chosen moment of its request's life."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from tests.helpers.cluster import MODEL, Cluster
from tests.helpers.traffic import asking, prompt_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

BACK_WITHIN_S = 2.0
LONG = 2000
"""Tokens: with 16 of them a step, a prefill of a second or more."""


@pytest.fixture(scope="module", params=["nixl", "stream"])
def cluster(request: pytest.FixtureRequest, wide_model: Path) -> Iterator[Cluster]:
    with Cluster(wide_model, transport=request.param, dtype="float32", num_blocks=600) as cluster:
        cluster.start("prefill", "prefill-0", max_num_batched_tokens=16)
        cluster.start("decode", "decode-0")
        yield cluster.wait_for("prefill-0", "decode-0")


async def is_prefilling(cluster: Cluster) -> None:
    await cluster.watch("prefill-0", lambda ledger: ledger.active > 0)


async def is_transferring(cluster: Cluster) -> None:
    await cluster.watch("decode-0", lambda ledger: ledger.landing > 0)


async def is_decoding(cluster: Cluster) -> None:
    await cluster.watch("decode-0", lambda ledger: ledger.active > 0)


@pytest.mark.parametrize(("seed", "moment"), [(10, is_prefilling), (11, is_transferring), (12, is_decoding)])
async def test_a_request_is_left_at_this_moment(
    cluster: Cluster, seed: int, moment: Callable[[Cluster], Awaitable[None]]
) -> None:
    prompt = prompt_of(LONG, seed)
    async with asking(cluster, prompt=prompt, max_tokens=2000, ignore_eos=True, n=2) as task:
        await moment(cluster)
        assert not task.done()
    cluster.wait_until_idle(BACK_WITHIN_S)
    assert len(cluster.complete(prompt, max_tokens=8)) > 0


async def test_transfers_are_left_after_any_pause(cluster: Cluster) -> None:
    for number in range(8):
        prompt = prompt_of(LONG, 1000 + number)
        async with asking(cluster, prompt=prompt, max_tokens=50):
            await is_transferring(cluster)
            await asyncio.sleep(0.04 * number)
        cluster.wait_until_idle(BACK_WITHIN_S)


async def test_an_owner_has_its_blocks_back_as_soon_as_they_are_pulled(cluster: Cluster) -> None:
    async with asking(cluster, prompt=prompt_of(500, 9), max_tokens=1500, ignore_eos=True) as task:
        await is_decoding(cluster)
        await cluster.watch("prefill-0", lambda ledger: ledger.free + ledger.cached == ledger.total)
        assert not task.done()


async def test_a_request_in_line_is_left_and_the_one_before_it_never_notices(cluster: Cluster) -> None:
    greedy = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
    async with asking(cluster, prompt=prompt_of(LONG, 1), **greedy) as first:
        await is_prefilling(cluster)
        async with asking(cluster, prompt=prompt_of(LONG, 2), **greedy) as second:
            await asyncio.sleep(0.3)
            assert not first.done()
            assert not second.done()
        answer = await first
    cluster.wait_until_idle(BACK_WITHIN_S)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["text"] == cluster.complete(prompt_of(LONG, 1), max_tokens=24)


async def test_a_stream_is_left_between_two_tokens(cluster: Cluster) -> None:
    client = cluster.client()
    async with client:
        stream = await client.completions.create(
            model=MODEL, prompt=prompt_of(100, 7), max_tokens=1900, stream=True, n=2, extra_body={"ignore_eos": True}
        )
        async with aclosing(stream.response.aiter_lines()) as lines:
            for _ in range(20):
                await anext(lines)
        await stream.close()
        cluster.wait_until_idle(BACK_WITHIN_S)


async def test_a_stop_string_ends_one_choice_and_frees_what_it_held(cluster: Cluster) -> None:
    client = cluster.client()
    async with client:
        answer = await client.completions.create(
            model=MODEL, prompt=prompt_of(100, 8), max_tokens=400, n=8, seed=3, stop=["q", "ld"], temperature=1.0
        )
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    assert len({len(choice.text) for choice in answer.choices}) > 1
    assert not any(stop in choice.text for choice in answer.choices for stop in ("q", "ld"))
    cluster.wait_until_idle(BACK_WITHIN_S)

"""Cached blocks lent by their hashes: little, not for long, and given back whatever happens."""

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

import pytest

from tailrace.errors import OverloadedError
from tailrace.kv.block_pool import BlockPool
from tailrace.messages import LendDone, LendTerms, LentBlocks
from tailrace.worker import cached_lending
from tailrace.worker.cached_lending import CachedLender
from tests.helpers.block_pools import cache_sequence, hashes_of, make_pool

T = TypeVar("T")


class Thread:
    """Runs what is posted when it is told to, as an engine does between two steps."""

    def __init__(self) -> None:
        self.inbox: list[Callable[[], object]] = []

    def post(self, function: Callable[..., object], *args: object) -> None:
        self.inbox.append(lambda: function(*args))

    async def call(self, function: Callable[..., T], *args: object) -> T:
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.inbox.append(lambda: future.set_result(function(*args)))
        return await future

    async def turn(self) -> None:
        """Between two steps."""
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        while self.inbox:
            self.inbox.pop(0)()
        await asyncio.sleep(0)


def make_lender(num_blocks: int = 40) -> tuple[CachedLender, Thread, BlockPool]:
    pool, thread = make_pool(num_blocks), Thread()
    return CachedLender(pool, thread, block_bytes=100, block_tokens=4, pool_address=5000), thread, pool


def terms(hashes: Sequence[bytes]) -> LendTerms:
    return LendTerms("", 0, b"", "store", 1, "stream", block_hashes=tuple(hashes))


async def test_the_cached_prefix_is_lent_until_the_needer_leaves() -> None:
    lender, thread, pool = make_lender()
    blocks = cache_sequence(pool, "a", 2)
    events = lender.lend(terms(hashes_of("a", 4)))
    first = asyncio.ensure_future(anext(events))
    await thread.turn()
    generations = [pool.generation(block) for block in blocks]
    assert await first == LentBlocks(0, blocks, [5000 + 100 * block for block in blocks], generations)
    assert await anext(events) == LendDone((), 0, 2 * 4, 0.0, 0.0)
    assert pool.ledger().lent == 2
    await events.aclose()
    await thread.turn()
    assert str(pool.ledger()) == "free=38 cached=2"
    pool.check_integrity()


async def test_no_more_than_a_tenth_of_the_pool_is_lent_at_a_time() -> None:
    lender, thread, pool = make_lender(40)
    cache_sequence(pool, "a", 10)
    cache_sequence(pool, "b", 10)
    first, second = lender.lend(terms(hashes_of("a", 10))), lender.lend(terms(hashes_of("b", 10)))
    told = [asyncio.ensure_future(anext(events)) for events in (first, second)]
    await thread.turn()
    assert [len((await each).blocks) for each in told] == [4, 0]  # type: ignore[union-attr]
    assert pool.ledger().lent == 4
    more = [await anext(events) for events in (first, second)]
    assert [done.cached_tokens for done in more] == [40, 40]  # type: ignore[union-attr]
    for events in (first, second):
        await events.aclose()
    await thread.turn()
    assert pool.ledger().lent == 0


async def test_a_needer_that_leaves_before_the_engine_has_time_holds_nothing() -> None:
    lender, thread, pool = make_lender()
    cache_sequence(pool, "a", 4)
    first = asyncio.ensure_future(anext(lender.lend(terms(hashes_of("a", 4)))))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await thread.turn()
    await thread.turn()
    assert str(pool.ledger()) == "free=36 cached=4"


async def test_a_sequence_that_needs_the_blocks_gets_them_and_the_needer_is_told() -> None:
    lender, thread, pool = make_lender()
    blocks = cache_sequence(pool, "a", 4)
    events = lender.lend(terms(hashes_of("a", 4)))
    first = asyncio.ensure_future(anext(events))
    await thread.turn()
    lent = await first
    assert isinstance(lent, LentBlocks)
    await anext(events)
    assert [(each.holder, each.blocks) for each in lender.holdings()] == [("store", tuple(blocks))]
    assert pool.allocate(40) is not None
    assert lender.holdings() == []
    assert all(pool.generation(block) != was for block, was in zip(lent.blocks, lent.generations, strict=True))
    with pytest.raises(OverloadedError, match="revoked"):
        await anext(events)
    await thread.turn()
    assert str(pool.ledger()) == "active=40"
    pool.check_integrity()


async def test_a_needer_that_is_gone_when_its_loan_is_revoked_changes_nothing() -> None:
    lender, thread, pool = make_lender()
    cache_sequence(pool, "a", 4)
    events = lender.lend(terms(hashes_of("a", 4)))
    first = asyncio.ensure_future(anext(events))
    await thread.turn()
    await first
    assert pool.allocate(40) is not None
    await events.aclose()
    await thread.turn()
    assert str(pool.ledger()) == "active=40"


async def test_a_loan_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store whose disk is slow cannot keep blocks from the sequences."""
    monkeypatch.setattr(cached_lending, "MAX_LOAN_S", 0.01)
    lender, thread, pool = make_lender()
    cache_sequence(pool, "a", 4)
    events = lender.lend(terms(hashes_of("a", 4)))
    first = asyncio.ensure_future(anext(events))
    await thread.turn()
    await first
    await anext(events)
    with pytest.raises(OverloadedError, match=r"ends after 0.01 s"):
        await anext(events)
    await thread.turn()
    assert pool.ledger().lent == 0

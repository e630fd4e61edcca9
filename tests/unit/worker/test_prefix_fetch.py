"""A chain's blocks pulled from their holders: what lands, whom it is asked of, and what is left when they fail."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from tailrace.errors import LayoutMismatchError, OverloadedError, WorkerLostError
from tailrace.kv.events import Tier
from tailrace.messages import LendDone, LentBlocks, PrefixSource
from tailrace.transfer import ReadOutcome
from tailrace.worker import prefix_fetch, reading
from tailrace.worker.prefix_fetch import PrefixPull, WantedPrefix, patience_s, tokens_by_tier
from tests.helpers.prefix_holders import FakeHolder, FakeHolders
from tests.helpers.stores import chain_of
from tests.helpers.waiting import until

CHAIN = chain_of("a", 12)
DONE = LendDone((), 0, 0, 0.0, 0.0)


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MIN_STALL_S", 0.1)
    monkeypatch.setattr(prefix_fetch, "ASK_AGAIN_S", 0.001)


def holder(name: str, first: int, end: int, **options: object) -> FakeHolder:
    return FakeHolder(name, CHAIN, range(first, end), **options)  # type: ignore[arg-type]


class Fetch:
    """Place i of the chain goes to block 100 + i."""

    def __init__(
        self, *holders: FakeHolder, sources: Sequence[PrefixSource] = (), num_local: int = 0, end: int = 12
    ) -> None:
        self.holders = FakeHolders(*holders)
        self.landed: list[int] = []
        self.settled: list[int] = []
        wanted = WantedPrefix(CHAIN, [100 + place for place in range(end)], num_local, 1 << 20, 4)
        self.pull = PrefixPull(
            wanted,
            sources or [each.source() for each in holders],
            landed=lambda blocks: self.landed.extend(block - 100 for block in blocks),
            settled=lambda blocks: self.settled.extend(block - 100 for block in blocks),
        )

    async def run(self, budget_s: float = 5.0) -> list[int]:
        """Places that landed."""
        await self.pull.run(self.holders, budget_s)
        assert not any(each.num_open for each in self.holders.holders.values()), "a loan is left open"
        return sorted(self.landed)

    @property
    def asked(self) -> list[tuple[str, int, int]]:
        """(holder, first place, number of blocks) of each loan."""
        return [
            (name, CHAIN.index(terms.block_hashes[0]), len(terms.block_hashes))
            for name, each in self.holders.holders.items()
            for terms in each.loans
        ]


async def test_each_holder_is_asked_for_its_part_and_all_of_them_at_once() -> None:
    silent = holder("c", 8, 12, is_silent=True)
    fetch = Fetch(holder("a", 0, 5, tier=Tier.CPU), holder("b", 5, 8), silent, num_local=2)
    running = asyncio.create_task(fetch.run())
    await until(lambda: len(fetch.landed) == 6)
    assert fetch.asked == [("a", 2, 3), ("b", 5, 3), ("c", 8, 4)]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert silent.num_open == 0
    result = fetch.pull.result()
    assert result.tiers == {2: Tier.CPU, 3: Tier.CPU, 4: Tier.CPU, 5: Tier.WORKER, 6: Tier.WORKER, 7: Tier.WORKER}
    assert [(f.holder_id, f.num_asked, f.num_blocks, f.num_bytes >> 20) for f in result.fetches] == [
        ("a", 3, 3, 3),
        ("b", 3, 3, 3),
        ("c", 4, 0, 0),
    ]
    assert result.transport == "stream"
    assert fetch.pull.close() == []


async def test_reads_go_where_the_blocks_belong_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_fetch, "MAX_READ_BYTES", 2 << 20)
    slow = holder("a", 0, 5, outcome=None)
    fetch = Fetch(slow, end=5)
    running = asyncio.create_task(fetch.run())
    await until(lambda: len(slow.pending) == 3)
    told = [[(r.source_block, r.source_address, r.generation, r.target_block) for r in rs] for rs, _ in slow.pending]
    assert told[0] == [(0, 0, 70, 100), (1, 1000, 71, 101)]
    assert told[2] == [(4, 4000, 74, 104)]
    for _ in range(3):
        assert slow.num_open == 1, "the loan lasts until everything is read"
        slow.finish(ReadOutcome.GOOD)
    await running
    assert sorted(fetch.landed) == [0, 1, 2, 3, 4]


async def test_a_holder_that_lends_little_at_a_time_is_asked_again() -> None:
    fetch = Fetch(holder("a", 0, 12, most=5))
    assert await fetch.run() == list(range(12))
    assert fetch.asked == [("a", 0, 12), ("a", 5, 7), ("a", 10, 2)]
    assert [(f.num_asked, f.num_blocks) for f in fetch.pull.result().fetches] == [(12, 12)]


async def test_a_holder_that_lends_a_block_at_a_time_brings_them_all() -> None:
    fetch = Fetch(holder("a", 0, 12, most=1))
    assert await fetch.run() == list(range(12))
    assert len(fetch.asked) == 12


async def test_a_holder_that_has_blocks_and_lends_none_is_not_asked_for_ever() -> None:
    fetch = Fetch(holder("a", 0, 12, most=0))
    assert await fetch.run() == []
    assert len(fetch.asked) == prefix_fetch.MAX_EMPTY_LOANS


async def test_a_holder_that_has_less_than_it_is_said_to_is_not_asked_again() -> None:
    """A lying entry of the index."""
    short = holder("a", 0, 3)
    fetch = Fetch(short, sources=[short.source(0, 12)])
    assert await fetch.run() == [0, 1, 2]
    assert fetch.asked == [("a", 0, 12)]


@pytest.mark.parametrize(
    "options",
    [
        {"unreachable": WorkerLostError("a: connection refused")},
        {"unreachable": WorkerLostError("a is a in epoch 4 now, not a in epoch 3")},
        {"unreachable": LayoutMismatchError("kv_dtype: owner=fp8 needer=bf16")},
        {"refusal": OverloadedError("256 loans are open")},
        {"told": []},
        {"told": [LentBlocks(1, [1], [1000], [71]), DONE]},
        {"told": [LentBlocks(0, list(range(9)), [0] * 9, [0] * 9), DONE]},
        {"told": [LentBlocks(0, [0], [0], [70], b"\x09"), DONE]},
        {"told": [LentBlocks(0, [], [], []), DONE]},
        {"outcome": ReadOutcome.STALE},
        {"outcome": ReadOutcome.FAILED},
    ],
    ids=["dead", "epoch", "layout", "refused", "hangs-up", "gap", "too-many", "tier", "nothing", "stale", "failed"],
)
async def test_a_holder_that_fails_is_asked_no_more_and_another_brings_its_blocks(options: dict[str, object]) -> None:
    fetch = Fetch(holder("a", 0, 4, **options), holder("b", 0, 8))
    assert await fetch.run() == list(range(8))
    assert fetch.asked.count(("b", 0, 4)) == 1
    assert [each for each in fetch.asked if each[0] == "a"] in ([], [("a", 0, 4)])
    assert fetch.pull.close() == []
    alone = Fetch(holder("a", 0, 4, **options))
    assert await alone.run() == []
    assert [(f.num_asked, f.num_blocks) for f in alone.pull.result().fetches] == [(4, 0)]


async def test_what_was_read_before_a_holder_went_wrong_counts() -> None:
    told: list[LentBlocks | LendDone] = [LentBlocks(0, [0, 1], [0, 1000], [70, 71]), LentBlocks(9, [9], [9], [79])]
    fetch = Fetch(holder("a", 0, 4, told=told))
    assert await fetch.run() == [0, 1]
    assert [(f.num_asked, f.num_blocks) for f in fetch.pull.result().fetches] == [(4, 2)]


async def test_the_loan_of_a_holder_that_went_wrong_lasts_until_what_it_lent_is_read() -> None:
    told: list[LentBlocks | LendDone] = [LentBlocks(0, [0, 1], [0, 1000], [70, 71]), LentBlocks(9, [9], [9], [79])]
    slow = holder("a", 0, 4, told=told, outcome=None)
    fetch = Fetch(slow)
    running = asyncio.create_task(fetch.run())
    await until(lambda: slow.pending)
    for _ in range(20):
        await asyncio.sleep(0)
    assert slow.num_open == 1
    slow.finish(ReadOutcome.GOOD)
    assert await running == [0, 1]


async def test_a_block_larger_than_a_read_is_read_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_fetch, "MAX_READ_BYTES", 1 << 19)
    assert await Fetch(holder("a", 0, 3), end=3).run() == [0, 1, 2]


async def test_nobody_is_asked_for_what_lies_behind_a_gap() -> None:
    first, last = holder("a", 0, 3), holder("b", 5, 12)
    fetch = Fetch(first, last)
    assert await fetch.run() == [0, 1, 2]
    assert fetch.asked == [("a", 0, 3)]


async def test_a_late_fetch_ends_in_time_and_what_may_still_be_written_is_named() -> None:
    slow = holder("a", 0, 3, outcome=None)
    fetch = Fetch(slow, holder("b", 3, 6), holder("c", 6, 9, is_silent=True))
    assert await fetch.run(0.3) == [3, 4, 5]
    assert fetch.pull.close() == [100, 101, 102]
    assert fetch.settled == []
    slow.finish(ReadOutcome.GOOD)
    await until(lambda: fetch.settled)
    assert (sorted(fetch.settled), sorted(fetch.landed)) == ([0, 1, 2], [3, 4, 5])


async def test_a_stalled_read_ends_its_fetch_before_the_time_is_up() -> None:
    slow = holder("a", 0, 3, outcome=None)
    fetch = Fetch(slow, holder("b", 0, 6))
    async with asyncio.timeout(10.0):
        assert await fetch.run(60.0) == [3, 4, 5]
    assert [each for each in fetch.asked if each[0] == "b"] == [("b", 3, 3)], "nobody else may write its blocks"
    assert fetch.pull.close() == [100, 101, 102]
    slow.finish(ReadOutcome.FAILED)
    await until(lambda: fetch.settled)


async def test_what_a_stalled_read_may_still_write_is_read_by_nobody_else() -> None:
    """The one that is asked instead of a dead holder has the stalled one's blocks, too."""
    slow = holder("b", 3, 6, outcome=None)
    fetch = Fetch(holder("a", 0, 3, unreachable=WorkerLostError("gone")), slow, holder("c", 0, 12))
    assert await fetch.run() == [0, 1, 2, *range(6, 12)]
    assert [each for each in fetch.asked if each[0] == "c"] == [("c", 6, 6), ("c", 0, 3)]
    assert fetch.pull.close() == [103, 104, 105]
    slow.finish(ReadOutcome.GOOD)
    await until(lambda: fetch.settled)


async def test_a_cancelled_fetch_names_what_may_still_be_written() -> None:
    slow = holder("a", 0, 3, outcome=None)
    fetch = Fetch(slow)
    running = asyncio.create_task(fetch.run())
    await until(lambda: slow.pending)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert running.cancelled()
    assert fetch.pull.close() == [100, 101, 102]
    slow.finish(ReadOutcome.STALE)
    await until(lambda: fetch.settled)


async def test_claims_beyond_what_is_wanted_are_cut() -> None:
    fetch = Fetch(holder("a", 0, 12), sources=[replace(holder("a", 0, 12).source(), num_blocks=2**31)], end=2)
    assert await fetch.run() == [0, 1]
    assert fetch.asked == [("a", 0, 2)]


@pytest.mark.parametrize(("compute_s", "patience"), [(1.024, 1.024), (0.064, 0.25), (0.0, 1.0)])
def test_a_fetch_may_take_what_computing_would(compute_s: float, patience: float) -> None:
    assert patience_s(compute_s) == patience


@pytest.mark.parametrize(
    ("fetched", "num_found", "counted"),
    [
        ({}, 3, {"worker": 40}),
        ({3: Tier.WORKER, 4: Tier.WORKER}, 3, {"worker": 32, "peer": 8}),
        # Places 3 to 6 lie before a window, and what was read behind them made them needless.
        ({7: Tier.CPU, 8: Tier.CPU, 9: Tier.NVME}, 3, {"worker": 12, "cpu": 24, "nvme": 4}),
        # It waited in line again, and found what it had fetched.
        ({0: Tier.CPU, 1: Tier.CPU}, 10, {"worker": 32, "cpu": 8}),
    ],
)
def test_every_cached_token_counts_for_one_tier(
    fetched: dict[int, Tier], num_found: int, counted: dict[str, int]
) -> None:
    assert tokens_by_tier(10, 4, fetched, num_found) == counted

"""Holders of cached blocks, as one needer sees them: honest, short, slow, dead and lying ones."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from tailrace.errors import TailraceError, WorkerLostError
from tailrace.kv.events import Tier
from tailrace.messages import KvSource, LegReport, LendDone, LendTerms, LentBlocks, PrefixSource, Submission
from tailrace.transfer import BlockRead, PendingRead, ReadOutcome, ReadResult
from tailrace.transfer.reads import RateMeter
from tailrace.worker import prefix_fetch, reading

if TYPE_CHECKING:
    from tests.helpers.worker_rigs import Rig

BLOCK_TOKENS = 4
PROMPT = list(range(100, 130))
ALL = range(7)
"""The whole blocks of PROMPT."""
Land = Callable[[int, int], None]
"""Writes the right content of a place of the chain into a block."""


@dataclass(eq=False)
class FakeHolder:
    """Holds the places `held` of one chain; its block numbers are the places."""

    worker_id: str
    chain: Sequence[bytes]
    held: range
    most: int = 1000
    """Blocks in one loan."""
    tier: Tier | None = None
    outcome: ReadOutcome | None = ReadOutcome.GOOD
    """Of its reads. None: they end when a test says so."""
    unreachable: TailraceError | None = None
    refusal: TailraceError | None = None
    told: list[LentBlocks | LendDone] | None = None
    """Instead of the truth; without a LendDone it closes the stream."""
    is_silent: bool = False
    """It takes the call and says nothing."""
    loans: list[LendTerms] = field(default_factory=list)
    num_open: int = 0
    pending: list[tuple[Sequence[BlockRead], PendingRead]] = field(default_factory=list)
    land: Land = lambda block, place: None

    # -- Link ---------------------------------------------------------------------------------------------------------

    transport = "stream"
    broken = False
    rate: RateMeter = field(default_factory=RateMeter)

    def read(self, reads: Sequence[BlockRead]) -> PendingRead:
        pending = PendingRead(asyncio.get_running_loop())
        self.pending.append((reads, pending))
        if self.outcome is not None:
            self.finish(self.outcome)
        return pending

    def finish(self, outcome: ReadOutcome) -> None:
        reads, pending = self.pending.pop(0)
        for read in reads:
            self.land(read.target_block, read.source_block if outcome is ReadOutcome.GOOD else -1)
        pending.settle(ReadResult(outcome, 0.001, len(reads), ""))

    def abort(self) -> None: ...

    def join(self) -> None: ...

    # -- what it lends ------------------------------------------------------------------------------------------------

    def source(self, first: int | None = None, end: int | None = None) -> PrefixSource:
        first, end = self.held.start if first is None else first, self.held.stop if end is None else end
        return PrefixSource(KvSource(self.worker_id, 3, f"{self.worker_id}:1", b""), first, end - first)

    def answer(self, terms: LendTerms) -> list[LentBlocks | LendDone]:
        if self.told is not None:
            return self.told
        places = [self.chain.index(name) for name in terms.block_hashes]
        there = [place for at, place in enumerate(places) if set(places[: at + 1]) <= set(self.held)]
        lent = there[: self.most]
        tiers = b"" if self.tier is None else bytes([self.tier]) * len(lent)
        blocks = LentBlocks(0, lent, [1000 * place for place in lent], [70 + place for place in lent], tiers)
        return [blocks, LendDone((), 0, len(there) * BLOCK_TOKENS, 0.0, 0.0)]

    async def events(self, terms: LendTerms) -> AsyncIterator[LentBlocks | LendDone]:
        if self.refusal is not None:
            raise self.refusal
        if self.is_silent:
            await asyncio.Event().wait()
        for event in self.answer(terms):
            yield event


class FakeHolders:
    """A Peers."""

    def __init__(self, *holders: FakeHolder) -> None:
        self.holders = {holder.worker_id: holder for holder in holders}

    def identity(self) -> tuple[str, int]:
        return "needer", 9

    async def link(self, source: KvSource) -> FakeHolder:
        await asyncio.sleep(0)
        holder = self.holders[source.worker_id]
        if holder.unreachable is not None:
            raise holder.unreachable
        return holder

    @asynccontextmanager
    async def lend(self, source: KvSource, terms: LendTerms) -> AsyncIterator[AsyncIterator[LentBlocks | LendDone]]:
        holder = self.holders[source.worker_id]
        holder.loans.append(terms)
        holder.num_open += 1
        try:
            yield holder.events(terms)
        finally:
            holder.num_open -= 1


# -- what prefill and decode workers must both stand ------------------------------------------------------------------

FAULTS = {
    "dead": ({"unreachable": WorkerLostError("gone")}, 0),
    "refused": ({"refusal": WorkerLostError("no")}, 0),
    "stale": ({"outcome": ReadOutcome.STALE}, 0),
    "failed": ({"outcome": ReadOutcome.FAILED}, 0),
    "hangs-up": ({"told": []}, 0),
    "short": ({"held": range(3)}, 12),
    "lying": ({"held": range(1, 7)}, 0),
    "silent": ({"is_silent": True}, 0),
    "little": ({"most": 2}, 28),
}
"""What is the matter with the holder of ALL, and how many tokens come from it all the same."""
each_fault = pytest.mark.parametrize(("options", "cached"), FAULTS.values(), ids=FAULTS.keys())


def patience(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(prefix_fetch, "patience_s", lambda compute_s: seconds)
    monkeypatch.setattr(reading, "MIN_STALL_S", seconds)


Answer = Callable[["Rig", Submission], Awaitable[LegReport]]
"""Waits for a submission's end and holds its tokens against the truth."""


async def fetch_from_a_faulty_one(rig: "Rig", answer: Answer, asking: Callable[..., Submission], fault: tuple) -> None:
    options, cached = fault
    holder = rig.add_holder("p", PROMPT, **{"held": ALL, **options})
    submission = asking(1, holder.source(0, 7))
    rig.submit(submission)
    report = await answer(rig, submission)
    assert report.cached_tokens == cached
    assert report.cached_by_tier == ({"peer": cached} if cached else {})
    [fetch] = report.fetches
    assert (fetch.holder_id, fetch.num_asked, fetch.num_blocks) == ("p", 7, cached // 4)
    await rig.until_idle()


async def fetch_from_three(
    rig: "Rig", answer: Answer, first: Submission, asking: Callable[..., Submission]
) -> LegReport:
    """`first` leaves the first block here; two other tiers and a peer have one part each of the rest."""
    rig.submit(first)
    await answer(rig, first)
    peer = rig.add_holder("p", PROMPT, range(2))
    store = rig.add_holder("s", PROMPT, range(2, 5), tier=Tier.CPU)
    disk = rig.add_holder("t", PROMPT, range(5, 7), tier=Tier.NVME)
    submission = asking(2, peer.source(), store.source(), disk.source())
    rig.submit(submission)
    report = await answer(rig, submission)
    assert report.cached_tokens == 28
    assert report.cached_by_tier == {"worker": 4, "peer": 4, "cpu": 12, "nvme": 8}
    assert [(f.holder_id, f.num_asked, f.num_blocks, f.num_bytes) for f in report.fetches] == [
        ("p", 1, 1, 256),
        ("s", 3, 3, 768),
        ("t", 2, 2, 512),
    ]
    assert (report.transfer_bytes, report.transport) == (6 * 256, "stream")
    assert min(report.queue_s, report.prefill_s, report.transfer_s) >= 0
    await rig.until_idle()
    return report


async def fetch_from_a_slow_one(rig: "Rig", answer: Answer, asking: Callable[..., Submission]) -> FakeHolder:
    """The slow holder, whose read is late."""
    slow = rig.add_holder("slow", PROMPT, range(2, 7), outcome=None)
    good = rig.add_holder("p", PROMPT, range(2), tier=Tier.CPU)
    submission = asking(1, good.source(), slow.source())
    rig.submit(submission)
    report = await answer(rig, submission)
    assert report.cached_by_tier == {"cpu": 8}, "found here when it was admitted again, and fetched all the same"
    assert [(f.num_asked, f.num_blocks) for f in report.fetches] == [(2, 2), (5, 0)]
    await rig.until_ledger("free", "cached", "quarantined")
    return slow

"""Holders of cached blocks, as one needer sees them: honest, short, slow, dead and lying ones."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tailrace.errors import TailraceError
from tailrace.kv.events import Tier
from tailrace.messages import KvSource, LendDone, LendTerms, LentBlocks, PrefixSource
from tailrace.transfer import BlockRead, PendingRead, ReadOutcome, ReadResult

BLOCK_TOKENS = 4
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
    bytes_per_s = 0.0

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

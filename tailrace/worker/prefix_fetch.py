"""Cached blocks of a chain, pulled from whoever is said to hold them: several holders at once, each as far as it goes.

Nothing that goes wrong here is an error. A holder that is away, refuses, lies, lends less than it was said to hold or
lends what is stale is asked no more; whoever wanted the blocks computes what is missing.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from tailrace.errors import TailraceError, TransferError
from tailrace.kv.events import Tier
from tailrace.kv.layout import KVLayout
from tailrace.messages import Fetch, KvSource, LendDone, LendTerms, LentBlocks, PrefixSource, Submission
from tailrace.policy.estimates import PrefillFit
from tailrace.policy.fetching import patience_s
from tailrace.policy.prefix_fetches import PrefixFetch
from tailrace.transfer import BlockRead, Link, PendingRead, ReadOutcome, ReadResult
from tailrace.worker.reading import LendEvents, Peers, stall_s
from tailrace.worker.report import PrefixDestination

log = logging.getLogger(__name__)

MAX_READ_BYTES = 32 << 20
"""In one read: what a slow link has brought so far is kept when the time is up."""
ASK_AGAIN_S = 0.01
_TIER_NAMES = {Tier.WORKER: "peer", Tier.CPU: "cpu", Tier.NVME: "nvme"}
"""Of what was fetched; what was here already is of the tier "worker"."""
MAX_EMPTY_LOANS = 3
"""In a row. An owner that has blocks and lends none lends to others, or has not noticed that our last loan is over."""


def prefix_destination(fetch: PrefixFetch, fit: PrefillFit, block_tokens: int) -> PrefixDestination:
    """Where a granted fetch reads into, and how long it may take by what `fit` has measured."""
    patience = patience_s(fit.seconds(fetch.num_found * block_tokens, fetch.end * block_tokens))
    blocks = tuple(fetch.blocks[: fetch.end])
    return PrefixDestination(fetch.request.id, fetch.request.hashes, blocks, fetch.num_local, patience)


def sources_of(submission: Submission, own_id: str) -> tuple[PrefixSource, ...]:
    """Who else is said to hold blocks of its chain; `own_id` is the worker that asks."""
    return tuple(piece for piece in submission.prefix_sources if piece.source.worker_id != own_id)


def pieces_of(sources: Sequence[PrefixSource]) -> list[range]:
    """The blocks that each of them claims, by place in the chain."""
    return [range(piece.first_block, piece.first_block + piece.num_blocks) for piece in sources]


def tokens_by_tier(num_blocks: int, block_tokens: int, fetched: Mapping[int, Tier], num_found: int) -> dict[str, int]:
    """Tokens of `num_blocks` leading blocks by where each was found; without tiers that gave none.

    `fetched`: by place in the chain. What was fetched for a request counts as that, even when it waited in line again
    and was found here then. Of the others the first `num_found` were here; those between, which lie before a window
    and were made needless by what was fetched, count as its first one.
    """
    by_tier: dict[str, int] = dict.fromkeys(("worker", *_TIER_NAMES.values()), 0)
    first = min(fetched, default=0)
    for place in range(num_blocks):
        tier = fetched.get(first if num_found <= place < first else place)
        by_tier["worker" if tier is None else _TIER_NAMES[tier]] += block_tokens
    return {tier: num_tokens for tier, num_tokens in by_tier.items() if num_tokens}


@dataclass(frozen=True, slots=True)
class WantedPrefix:
    hashes: Sequence[bytes]
    """Of the chain, from its root on."""
    blocks: Sequence[int]
    """Where its first blocks are, or go."""
    num_local: int
    """So many of them are there already."""
    block_bytes: int
    block_tokens: int

    @classmethod
    def of(cls, destination: PrefixDestination, layout: KVLayout) -> "WantedPrefix":
        blocks, num_local = destination.blocks, destination.num_local
        return cls(destination.hashes, blocks, num_local, layout.block_bytes, layout.block_size)


@dataclass(frozen=True, slots=True)
class PulledPrefix:
    """What came of it."""

    tiers: dict[int, Tier] = field(default_factory=dict)
    """Where each block that landed was found, by its place in the chain."""
    fetches: tuple[Fetch, ...] = ()
    transport: str = ""
    seconds: float = 0.0

    @property
    def num_bytes(self) -> int:
        return sum(fetch.num_bytes for fetch in self.fetches)


@dataclass(slots=True, eq=False)
class _Holder:
    source: KvSource
    claimed: range
    is_over: bool = False
    """It is asked no more."""
    asked: set[int] = field(default_factory=set)
    num_blocks: int = 0
    num_empty: int = 0
    """Loans in a row that held nothing."""
    transport: str = ""
    began: float = 0.0
    """0: it was never met."""
    ended: float = 0.0

    @property
    def seconds(self) -> float:
        return self.ended - self.began if self.began else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class _Share:
    """What one holder is asked for: `places` in the chain."""

    holder: _Holder
    places: range


@dataclass(frozen=True, slots=True, eq=False)
class _Flight:
    """A read that may still write its targets."""

    holder: _Holder
    read: PendingRead
    tiers: dict[int, Tier]
    """By place in the chain."""
    targets: tuple[int, ...]
    deadline: float


class PrefixPull:
    """One chain's fetch. Event loop only.

    `landed` is told the blocks of each read that ended well; `settled`, once the fetch is closed, those of each read
    that outlived it. A block that was told to neither may still be written.
    """

    def __init__(
        self,
        wanted: WantedPrefix,
        sources: Sequence[PrefixSource],
        *,
        landed: Callable[[tuple[int, ...]], None],
        settled: Callable[[tuple[int, ...]], None],
    ) -> None:
        """`sources`: of two that claim the same block, the first is asked, and the other where that fails."""
        self._wanted = wanted
        end = len(wanted.blocks)
        self._holders = [
            _Holder(s.source, range(s.first_block, min(end, s.first_block + s.num_blocks))) for s in sources
        ]
        self._tell_landed = landed
        self._tell_settled = settled
        self._flights: set[_Flight] = set()
        self._tiers: dict[int, Tier] = {}
        self._began = time.monotonic()
        self._is_closed = False

    async def run(self, peers: Peers, budget_s: float) -> None:
        """Returns when everything has landed, when nobody has more, or when the time is up."""
        try:
            async with asyncio.timeout(budget_s):
                while shares := self._shares():
                    async with asyncio.TaskGroup() as group:
                        for share in shares:
                            group.create_task(self._pull(peers, share))
        except TimeoutError:
            late = {h.source.worker_id for h in self._holders if h.asked and not h.is_over}
            log.info("a prefix did not come from %s within %.2f s", ", ".join(sorted(late)), budget_s)

    def close(self) -> list[int]:
        """Blocks that reads in flight may still write; `settled` is told each when its read is over."""
        self._is_closed = True
        return [block for flight in self._flights for block in flight.targets]

    def result(self) -> PulledPrefix:
        asked = [holder for holder in self._holders if holder.asked]
        size = self._wanted.block_bytes
        return PulledPrefix(
            dict(self._tiers),
            tuple(Fetch(h.source.worker_id, len(h.asked), h.num_blocks, h.num_blocks * size, h.seconds) for h in asked),
            ",".join(sorted({holder.transport for holder in asked if holder.num_blocks})),
            time.monotonic() - self._began,
        )

    # -- whom to ask --------------------------------------------------------------------------------------------------

    def _shares(self) -> list[_Share]:
        """What is missing, each block of the first that claims it, up to the first block that nobody does.

        Nobody is asked for a block that a stalled read may still write, nor for what is behind it.
        """
        writing = {place for flight in self._flights for place in flight.tiers}
        shares: list[_Share] = []
        place, end = self._wanted.num_local, len(self._wanted.blocks)
        while place < end and place not in writing:
            if place in self._tiers:
                place += 1
                continue
            holder = next((h for h in self._holders if not h.is_over and place in h.claimed), None)
            if holder is None:
                break
            stop = place + 1
            while stop < holder.claimed.stop and stop not in self._tiers and stop not in writing:
                stop += 1
            shares.append(_Share(holder, range(place, stop)))
            place = stop
        return shares

    # -- one holder ---------------------------------------------------------------------------------------------------

    async def _pull(self, peers: Peers, share: _Share) -> None:
        holder = share.holder
        holder.asked.update(share.places)
        try:
            link = await peers.link(holder.source)
            # A first meeting says nothing of how fast the next fetch will be.
            holder.began = holder.began or time.monotonic()
            holder.transport = link.transport
            holder.is_over = not await self._borrow(peers, link, share)
        except TailraceError as error:
            holder.is_over = True
            log.info("%s is asked for no more of a prefix: %s", holder.source.worker_id, error.message)
        finally:
            holder.ended = time.monotonic()

    async def _borrow(self, peers: Peers, link: Link, share: _Share) -> bool:
        """Whether the holder may be asked again: it lent all of its share, or less than it has."""
        names = tuple(self._wanted.hashes[share.places.start : share.places.stop])
        terms = LendTerms("", 0, b"", *peers.identity(), link.transport, block_hashes=names)
        flights: list[_Flight] = []
        async with peers.lend(share.holder.source, terms) as events:
            try:
                num_told, done = await self._follow(link, events, share, flights)
            except TailraceError:
                await self._landed(flights)
                raise
            # Leaving the block ends the loan.
            await self._landed(flights)
        num_there = min(done.cached_tokens // self._wanted.block_tokens, len(share.places))
        if num_there <= num_told:
            return num_told == len(share.places)
        share.holder.num_empty = 0 if num_told else share.holder.num_empty + 1
        if not num_told:
            await asyncio.sleep(ASK_AGAIN_S)
        return share.holder.num_empty < MAX_EMPTY_LOANS

    async def _follow(
        self, link: Link, events: LendEvents, share: _Share, flights: list[_Flight]
    ) -> tuple[int, LendDone]:
        """Starts a read of whatever is told; adds to `flights`."""
        num_told = 0
        async for event in events:
            if isinstance(event, LendDone):
                return num_told, event
            _check_next(event, num_told, share)
            num_told += len(event.blocks)
            flights += self._start(link, event, share)
        raise TransferError("it closed the stream before it had told all")

    def _start(self, link: Link, lent: LentBlocks, share: _Share) -> list[_Flight]:
        tiers = [Tier(tier) for tier in lent.tiers] or [Tier.WORKER] * len(lent.blocks)
        first = share.places.start + lent.first_index
        most = max(1, MAX_READ_BYTES // self._wanted.block_bytes)
        flights = []
        for start in range(0, len(lent.blocks), most):
            piece = range(start, min(start + most, len(lent.blocks)))
            targets = tuple(self._wanted.blocks[first + at] for at in piece)
            reads = [
                BlockRead(lent.blocks[at], lent.addresses[at], lent.generations[at], target)
                for at, target in zip(piece, targets, strict=True)
            ]
            # Reads of one link take turns: each waits for those before it.
            num_before = sum(len(flight.targets) for flight in self._flights)
            deadline = time.monotonic() + stall_s(link, (num_before + len(reads)) * self._wanted.block_bytes)
            places = {first + at: tiers[at] for at in piece}
            flight = _Flight(share.holder, link.read(reads), places, targets, deadline)
            self._flights.add(flight)
            flight.read.settled.add_done_callback(partial(self._on_settled, flight))
            flights.append(flight)
        return flights

    def _on_settled(self, flight: _Flight, settled: asyncio.Future[ReadResult]) -> None:
        """Nothing can land any more."""
        self._flights.remove(flight)
        if self._is_closed:
            self._tell_settled(flight.targets)
        elif settled.result().outcome is ReadOutcome.GOOD:
            self._tiers.update(flight.tiers)
            flight.holder.num_blocks += len(flight.targets)
            flight.holder.ended = time.monotonic()
            self._tell_landed(flight.targets)

    async def _landed(self, flights: Sequence[_Flight]) -> None:
        """Raises TransferError for a read that failed, was stale or stalls; the others are over then, too."""
        wrong = ""
        for flight in flights:
            result = await flight.read.wait(max(0.0, flight.deadline - time.monotonic()))
            if result is None:
                wrong = f"a read of {len(flight.targets)} blocks stalls"
            elif result.outcome is not ReadOutcome.GOOD:
                wrong = wrong or result.message or str(result.outcome)
        if wrong:
            raise TransferError(wrong)


def _check_next(lent: LentBlocks, num_told: int, share: _Share) -> None:
    """Blocks are told in order, each once, and no others than were asked for."""
    end = lent.first_index + len(lent.blocks)
    if lent.first_index != num_told or end > len(share.places):
        raise TransferError(f"it lent blocks {lent.first_index} to {end - 1} of {len(share.places)} after {num_told}")
    if unknown := set(lent.tiers) - set(Tier):
        raise TransferError(f"it lent blocks of unknown tiers {sorted(unknown)}")

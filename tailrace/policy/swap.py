"""Blocks that a decode worker fetches for what it computes itself: of sequences that gave way, from the store, where
that is cheaper than computing them again; of new prompts, from whoever a gateway has found to be cheaper.

Who fetches holds all the blocks that it will need, found, landing or fresh, and waits for nothing but its own reads,
which end in a bounded time whatever happens to the store. It gives way to nobody meanwhile, and at most half of the
pool is held like this unless there is only one: so whoever runs can go on, and two that fetch cannot wait for each
other. A sequence that is cancelled meanwhile is forgotten at once, its blocks when its fetch has ended.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from tailrace.kv.window import LeadingBlocks
from tailrace.policy.prefix_fetches import PrefixFetch, PrefixFetches, reach_of
from tailrace.policy.prompt_tables import PromptTables
from tailrace.policy.request import Request
from tailrace.policy.sequence import Sequence

OVERHEAD_S = 0.005
"""Asking, and the turns of the event loop and of the engine until the blocks can be used."""
MIN_BLOCKS = 16
"""So many may be fetched at once in a pool of any size."""
MAX_SKIPPED = 64
WEIGHT = 0.2
"""Of a new measurement."""


class SwapCost:
    """Is fetching cheaper than computing, by measured rates? Where one is not known yet, fetching finds out.

    After a fetch that brought nothing the next one is skipped, then two, four, and so on: a store that stands still
    costs each of these fetches its patience. After MAX_SKIPPED refusals for the price one is let through: what was
    measured may be long ago.
    """

    def __init__(self, *, block_bytes: int, block_tokens: int) -> None:
        self._block_bytes = block_bytes
        self.block_tokens = block_tokens
        self.prefill_s: Callable[[int, int], float] = lambda first, end: 0.0
        """Seconds of computing tokens `first` to `end`; set by the worker, 0: not measured."""
        self.fetch_bytes_per_s = 0.0
        """0: not measured."""
        self._num_to_skip = 0
        self._last_skip = 0
        self._num_refused = 0
        """In a row, for the price."""

    def is_cheaper(self, num_blocks: int, *, num_found: int = 0, num_read: int | None = None) -> bool:
        """`num_blocks` behind `num_found` that are here. Asked once a sequence: False counts as a skipped one.

        `num_read`: so many of them are read in place of all.
        """
        if self._num_to_skip > 0:
            self._num_to_skip -= 1
            return False
        compute_s = self.prefill_s(num_found * self.block_tokens, (num_found + num_blocks) * self.block_tokens)
        if compute_s <= 0 or self.fetch_bytes_per_s <= 0:
            return True
        num_read = num_blocks if num_read is None else num_read
        fetch_s = num_read * self._block_bytes / self.fetch_bytes_per_s + OVERHEAD_S
        if fetch_s < compute_s or self._num_refused >= MAX_SKIPPED:
            self._num_refused = 0
            return True
        self._num_refused += 1
        return False

    def note(self, num_blocks: int, seconds: float) -> None:
        """A fetch brought so many blocks in so many seconds."""
        if num_blocks == 0:
            self._last_skip = self._num_to_skip = min(MAX_SKIPPED, max(1, 2 * self._last_skip))
            return
        self._last_skip = 0
        rate = num_blocks * self._block_bytes / max(seconds, 1e-6)
        known = self.fetch_bytes_per_s
        self.fetch_bytes_per_s = (1 - WEIGHT) * known + WEIGHT * rate if known else rate


@dataclass(frozen=True, slots=True, eq=False)
class Fetched:
    """So much of its block table is `ready`, the rest is to be computed."""

    sequence: Sequence
    table: LeadingBlocks
    num_ready: int


class SwapIns:
    """Those that fetch, by an id of their own: a request may have several choices here."""

    def __init__(self, tables: PromptTables, cost: SwapCost | None) -> None:
        """`cost`: None where there is no store."""
        self._fetches = PrefixFetches(tables)
        self._cost = cost
        self._sequences: dict[int, Sequence] = {}
        """Those that are still wanted."""
        self._prompts: dict[int, int] = {}
        """By fetch, the request whose prompt it is for."""
        self._next_id = 1

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def num_tokens(self) -> int:
        """To be computed once what is fetched has come."""
        return self._fetches.num_tokens

    def sequences(self) -> list[Sequence]:
        return list(self._sequences.values())

    def request_of(self, swap_id: int) -> int:
        """The request's id; -1: it is gone."""
        sequence = self._sequences.get(swap_id)
        return sequence.request.id if sequence is not None else -1

    def prompt_of(self, swap_id: int) -> int | None:
        """The request whose prompt it is for, until it has ended; None: it is for blocks that were lost here."""
        return self._prompts.get(swap_id)

    def num_found(self, swap_id: int) -> int:
        """Leading blocks that were here when it began."""
        return self._fetches.num_found(swap_id)

    def held(self) -> list[tuple[Sequence | None, PrefixFetch]]:
        """Who holds which blocks; None: somebody who is gone."""
        return [(self._sequences.get(fetch.request.id), fetch) for fetch in self._fetches.all()]

    def reach(self, sequence: Sequence, num_found: int, limit: int) -> int:
        """Leading blocks, `limit` at most, that are worth waiting for; `num_found` are here already."""
        # What is late is kept from everybody else: of a pool that is not tiny, no more than may be quarantined.
        most = max(MIN_BLOCKS, self._fetches.num_quarantinable)
        named = reach_of(sequence.elsewhere, num_found)
        end = min(max(named, sequence.num_offered), limit)
        if self._fetches.num_read(num_found, end) > most:
            end = num_found + most
        if end <= num_found or not self._fetches.may_fetch:
            return num_found
        if sequence.elsewhere:
            return end
        if self._cost is None:
            return num_found
        num_read = self._fetches.num_read(num_found, end)
        if self._cost.is_cheaper(end - num_found, num_found=num_found, num_read=num_read):
            return end
        sequence.num_offered = 0
        return num_found

    def will_find(self, hashes: Seq[bytes], num_found: int) -> bool:
        """Does a fetch bring the block that a sequence with these hashes lacks first?"""
        return self._fetches.will_find(hashes, num_found)

    def claim(self, sequence: Sequence, found: LeadingBlocks, end: int, *, spare: int) -> bool:
        """All its blocks at once, `found` first. False: the pool cannot give them now and keep `spare` blocks."""
        request = sequence.request
        stand_in = Request(
            self._next_id,
            sequence.tokens,
            request.num_prompt_tokens,
            request.sampling,
            sequence.choices,
            request.priority,
            request.hash_seed,
            sequence.hashes,
            request.tenant,
        )
        if not self._fetches.claim(stand_in, found, end, spare=spare):
            return False
        self._next_id += 1
        self._sequences[stand_in.id] = sequence
        if sequence.elsewhere:
            self._prompts[stand_in.id] = request.id
        sequence.num_offered, sequence.elsewhere = 0, ()
        return True

    def drain_granted(self) -> list[PrefixFetch]:
        """Whose reads may begin since the last call; `request.id` is the fetch's. Each ends with `end`."""
        return self._fetches.drain_granted()

    def landed(self, swap_id: int, blocks: Seq[int]) -> None:
        """A read into these blocks ended well."""
        self._fetches.landed(swap_id, blocks)

    def end(self, swap_id: int, in_flight: Seq[int]) -> Sequence | None:
        """Nothing more comes. Returned: who must wait in line again, because blocks `in_flight` may still be written.

        These stay landing.
        """
        self._prompts.pop(swap_id, None)
        if swap_id not in self._sequences:
            self._fetches.drop(swap_id, in_flight)
            return None
        late = self._fetches.end(swap_id, in_flight)
        return self._sequences.pop(swap_id) if late is not None else None

    def take_ended(self) -> Fetched | None:
        """The first of those that can go on; its blocks are the caller's now."""
        if (ended := self._fetches.first_ended()) is None:
            return None
        self._fetches.take(ended)
        table = LeadingBlocks(ended.blocks, ended.num_gone)
        return Fetched(self._sequences.pop(ended.request.id), table, ended.num_ready)

    def discard(self, sequence: Sequence) -> None:
        """Also somebody who does not fetch."""
        for swap_id, fetching in list(self._sequences.items()):
            if fetching is sequence:
                del self._sequences[swap_id]
                # What nothing is read into any more nobody else would give back.
                if self._fetches.has_ended(swap_id):
                    self._fetches.drop(swap_id, ())

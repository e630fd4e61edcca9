"""Prompts that a decode worker computes itself: admitted one by one, computed in chunks beside the running batch."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from tailrace.kv.block_pool import BlockPool
from tailrace.kv.hashing import hash_blocks
from tailrace.kv.window import LeadingBlocks, Window
from tailrace.plan import BlockAppend, Chunk, SequenceStart
from tailrace.policy.flights import Flights
from tailrace.policy.line import Line
from tailrace.policy.prompt_tables import PromptTables
from tailrace.policy.running import PlannedRows
from tailrace.policy.sequence import Sequence
from tailrace.policy.slots import Slots
from tailrace.policy.swap import SwapCost, SwapIns


@dataclass(frozen=True, slots=True)
class LocalChunks:
    """Of one step: the chunks, whose they are, who of them has a slot since this step, and who got blocks."""

    chunks: list[Chunk] = field(default_factory=list)
    prompts: list[Sequence] = field(default_factory=list)
    started: list[SequenceStart] = field(default_factory=list)
    appended: list[BlockAppend] = field(default_factory=list)

    def add(self, sequence: Sequence, budget: int, block_size: int) -> int:
        """The sequence's next chunk, as far as its blocks go; its number of tokens."""
        start, total = sequence.num_planned, len(sequence.tokens)
        end = sequence.num_planned = min(total, start + budget, len(sequence.blocks) * block_size)
        if end == start:
            return 0
        self.chunks.append(Chunk(sequence.slot, start, end, sequence.choices if end == total else ()))
        self.prompts.append(sequence)
        return end - start


class LocalPrefill:
    """Who waits, who fetches, and who computes."""

    def __init__(
        self,
        pool: BlockPool,
        slots: Slots,
        flights: Flights[PlannedRows],
        window: Window,
        budget: int,
        cost: SwapCost | None,
    ) -> None:
        """`budget`: tokens a step."""
        self._pool = pool
        self._slots = slots
        self._flights = flights
        self._window = window
        self._block_size = window.block_size
        self._tables = PromptTables(pool, window, budget)
        self.line: Line[Sequence] = Line()
        self.swaps = SwapIns(self._tables, cost)
        self.computing: list[Sequence] = []

    @property
    def waiting_tokens(self) -> int:
        todo = sum(len(s.tokens) - s.num_computed for s in [*self.line.all(), *self.computing])
        return todo + self.swaps.num_tokens

    @property
    def num_waiting(self) -> int:
        return len(self.line) + len(self.swaps)

    def waiting(self) -> list[Sequence]:
        """Those without a slot."""
        return [*self.line.all(), *self.swaps.sequences()]

    def end_swap(self, swap_id: int, in_flight: Seq[int]) -> bool:
        """Nothing more is read for it. Blocks `in_flight` may still be written, and stay landing.

        True: it is in line again.
        """
        if (late := self.swaps.end(swap_id, in_flight)) is not None:
            self.line.add(late)
        return late is not None

    def discard(self, sequence: Sequence) -> None:
        """Also somebody who is not here."""
        self.line.discard(sequence)
        self.swaps.discard(sequence)
        self.computing = [s for s in self.computing if s is not sequence]

    def plan(self, budget: int, *, spare: int) -> LocalChunks:
        """Chunks of `budget` tokens at most; whoever is admitted leaves `spare` blocks available."""
        work = LocalChunks()
        for sequence in self.computing:
            if budget > 0 and sequence.num_planned < len(sequence.tokens):
                if grown := self._tables.grow(sequence, len(sequence.tokens)):
                    work.appended.append(BlockAppend(sequence.slot, len(sequence.blocks) - len(grown), grown))
                budget -= work.add(sequence, budget, self._block_size)
        while budget > 0 and (admitted := self._admit(spare)) is not None:
            work.started.append(admitted.as_start())
            budget -= work.add(admitted, budget, self._block_size)
        return work

    def _admit(self, spare: int) -> Sequence | None:
        """Whose blocks have been fetched, then the head of the line, unless it fetches first: then the next."""
        if not len(self._slots):
            return None
        if (fetched := self.swaps.take_ended()) is not None:
            return self._enter(fetched.sequence, fetched.table, fetched.num_ready)
        while (sequence := self.line.head) is not None:
            if not sequence.hashes:
                sequence.hashes = hash_blocks(sequence.tokens, self._block_size, sequence.request.hash_seed)
            reusable = sequence.hashes[: (len(sequence.tokens) - 1) // self._block_size]
            cached = self._window.find(self._pool, reusable)
            if self._flights.will_find(reusable, len(cached)) or self.swaps.will_find(reusable, len(cached)):
                return None
            end = self.swaps.reach(sequence, len(cached), len(reusable))
            if end == len(cached):
                return self._start_at_once(sequence, cached, spare)
            if not self.swaps.claim(sequence, cached, end, spare=spare):
                return None
            self.line.pop()
        return None

    def _start_at_once(self, sequence: Sequence, cached: LeadingBlocks, spare: int) -> Sequence | None:
        """None: there is no room."""
        table = self._tables.claim(len(sequence.tokens), cached, spare=spare)
        if table is None:
            return None
        self.line.pop()
        return self._enter(sequence, table, len(cached))

    def _enter(self, sequence: Sequence, table: LeadingBlocks, num_ready: int) -> Sequence:
        sequence.enter(self._slots.take())
        sequence.blocks, sequence.num_gone, sequence.elsewhere = table.blocks, table.num_gone, ()
        sequence.num_found = num_ready
        sequence.num_computed = sequence.num_planned = num_ready * self._block_size
        self.computing.append(sequence)
        return sequence

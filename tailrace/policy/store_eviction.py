"""Which block a tier of the store gives up first: the one worth least.

A block is worth the moment of its last use and a bonus for each doubling of its uses: recency and frequency in one
number that only a use changes, so that a heap keeps the order. Of blocks worth the same the deepest goes first. A use
of a chain is one moment for all of its blocks from the root on, so a block is never worth more than the one before it:
a prefix's root outlives its leaves, and what is kept stays reachable.
"""

import heapq
from collections.abc import Hashable
from dataclasses import dataclass, field
from math import log2

TURNOVERS_PER_DOUBLING = 0.5
"""What a doubling of the uses is worth: so many turnovers of the tier, a turnover being as many new blocks as fit."""
MAX_COUNTED_USES = 16
"""More make no difference: what was popular for long must be able to leave within some turnovers."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a block's worth is made of. `moment`: of the last use, in blocks that the store had taken until then."""

    moment: int
    uses: int
    depth: int
    """Blocks before it in its chain."""
    tenant: str = ""


@dataclass(slots=True)
class _Candidates:
    """Those of one tenant. Entries of a heap whose ticket is no longer the key's are dead."""

    heap: list[tuple[float, int, int, int]] = field(default_factory=list)
    num_alive: int = 0


class EvictionOrder:
    """The blocks of one tier that could be given up, by the slot that they are in. O(log n) each call."""

    def __init__(self, capacity: int) -> None:
        """`capacity`: slots of the tier."""
        self._bonus = TURNOVERS_PER_DOUBLING * capacity
        self._tickets: dict[int, tuple[int, str]] = {}
        self._candidates: dict[str, _Candidates] = {}
        self._next_ticket = 0

    def __len__(self) -> int:
        return len(self._tickets)

    def __contains__(self, slot: Hashable) -> bool:
        return slot in self._tickets

    def add(self, slot: int, usage: Usage) -> None:
        """From now on the block can be given up. Again for one that is there: its usage has changed."""
        self.remove(slot)
        candidates = self._candidates.setdefault(usage.tenant, _Candidates())
        self._next_ticket += 1
        self._tickets[slot] = (self._next_ticket, usage.tenant)
        candidates.num_alive += 1
        heapq.heappush(candidates.heap, (self._worth(usage), -usage.depth, self._next_ticket, slot))
        if len(candidates.heap) > 2 * candidates.num_alive + 64:
            candidates.heap = [entry for entry in candidates.heap if self._is_alive(entry)]
            heapq.heapify(candidates.heap)

    def remove(self, slot: int) -> None:
        """Idempotent."""
        _, tenant = self._tickets.pop(slot, (0, None))
        if tenant is not None:
            self._candidates[tenant].num_alive -= 1
            if not self._candidates[tenant].num_alive:
                del self._candidates[tenant]

    def victim(self, tenant: str | None = None) -> int | None:
        """The slot to give up, among one tenant's or all; None when there is none. Changes nothing that shows."""
        tenants = self._candidates if tenant is None else {tenant} & self._candidates.keys()
        firsts = [self._first(self._candidates[name]) for name in tenants]
        return min(firsts)[-1] if firsts else None

    def num_of(self, tenant: str) -> int:
        candidates = self._candidates.get(tenant)
        return candidates.num_alive if candidates else 0

    def slots(self) -> list[int]:
        return list(self._tickets)

    def _first(self, candidates: _Candidates) -> tuple[float, int, int, int]:
        while not self._is_alive(candidates.heap[0]):
            heapq.heappop(candidates.heap)
        return candidates.heap[0]

    def _is_alive(self, entry: tuple[float, int, int, int]) -> bool:
        return self._tickets.get(entry[-1], (0, ""))[0] == entry[2]

    def _worth(self, usage: Usage) -> float:
        return usage.moment + self._bonus * log2(max(1, min(usage.uses, MAX_COUNTED_USES)))

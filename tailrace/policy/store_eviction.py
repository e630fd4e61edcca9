"""Which block a tier of the store gives up first: the one worth least.

A block is worth the moment of its last use and a bonus for each doubling of its uses: recency and frequency in one
number that only a use changes, so that a heap keeps the order. Of blocks worth the same the deepest goes first. A use
of a chain is one moment for all of its blocks from the root on, so a block is never worth more than the one before it:
a prefix's root outlives its leaves, and what is kept stays reachable.
"""

import heapq
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from math import log2

_Entry = tuple[float, int, int, int]
"""Worth, -depth, ticket, slot: the first to go is the least."""

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


class EvictionOrder:
    """The blocks of one tier that could be given up, by the slot that they are in. O(log n), but for `set_apart`."""

    def __init__(self, capacity: int) -> None:
        """`capacity`: slots of the tier."""
        self._bonus = TURNOVERS_PER_DOUBLING * capacity
        self._tickets: dict[int, tuple[int, str]] = {}
        self._next_ticket = 0
        self._num_of: Counter[str] = Counter()
        # Entries of a heap whose ticket is no longer the slot's are dead.
        self._all: list[_Entry] = []
        self._apart: dict[str, list[_Entry]] = {}
        """Those of single tenants. Not of each: anybody may come under thousands of names."""

    def __len__(self) -> int:
        return len(self._tickets)

    def __contains__(self, slot: Hashable) -> bool:
        return slot in self._tickets

    def add(self, slot: int, usage: Usage) -> None:
        """From now on the block can be given up. Again for one that is there: its usage has changed."""
        self.remove(slot)
        self._next_ticket += 1
        self._tickets[slot] = (self._next_ticket, usage.tenant)
        self._num_of[usage.tenant] += 1
        entry = (self._worth(usage), -usage.depth, self._next_ticket, slot)
        self._push(self._all, entry, len(self._tickets))
        if (own := self._apart.get(usage.tenant)) is not None:
            self._push(own, entry, self._num_of[usage.tenant])

    def remove(self, slot: int) -> None:
        """Idempotent."""
        _, tenant = self._tickets.pop(slot, (0, None))
        if tenant is not None:
            self._num_of[tenant] -= 1
            if not self._num_of[tenant]:
                del self._num_of[tenant]

    def set_apart(self, tenant: str) -> None:
        """Its own victim can be asked for from now on. Idempotent; O(n) the first time."""
        if tenant not in self._apart:
            self._apart[tenant] = [e for e in self._all if self._is_alive(e) and self._tickets[e[-1]][1] == tenant]
            heapq.heapify(self._apart[tenant])

    def put_back(self, tenant: str) -> None:
        """Ends `set_apart`. Idempotent."""
        self._apart.pop(tenant, None)

    def victim(self, tenant: str | None = None) -> int | None:
        """The slot to give up, of all or of one tenant's; None when there is none. Changes nothing that shows.

        Raises ValueError for a tenant that is not set apart.
        """
        heap = self._all if tenant is None else self._apart.get(tenant)
        if heap is None:
            raise ValueError(f"tenant {tenant!r} is not set apart")
        while heap and not self._is_alive(heap[0]):
            heapq.heappop(heap)
        return heap[0][-1] if heap else None

    def num_of(self, tenant: str) -> int:
        return self._num_of[tenant]

    def slots(self) -> list[int]:
        return list(self._tickets)

    def _push(self, heap: list[_Entry], entry: _Entry, num_alive: int) -> None:
        heapq.heappush(heap, entry)
        if len(heap) > 2 * num_alive + 64:
            heap[:] = [each for each in heap if self._is_alive(each)]
            heapq.heapify(heap)

    def _is_alive(self, entry: _Entry) -> bool:
        return self._tickets.get(entry[-1], (0, ""))[0] == entry[2]

    def _worth(self, usage: Usage) -> float:
        return usage.moment + self._bonus * log2(max(1, min(usage.uses, MAX_COUNTED_USES)))

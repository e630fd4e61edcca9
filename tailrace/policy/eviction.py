"""Which cached block goes first: recency, frequency and depth as one order, beside plain recency to compare with.

Greedy dual (Cao and Irani, "Cost-aware WWW proxy caching algorithms", 1997) with frequency (Cherkasova, 1998): a
block's rank is the clock when it was last used plus how often it was used; the clock is the rank of the last block
evicted. So a use is worth a constant while nothing is evicted, and fades as others come and go.

Depth comes in without a term. A use of a block is a use of all before it in its prefix, so none of those is used less
often; and `add` is called from a prefix's tail to its root, so among equals the tail goes first. A root outlives its
leaves.
"""

import heapq
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

MAX_USES = 8
"""Beyond these a block's uses count no more: what was hot once must not stay for ever."""

K = TypeVar("K")


class EvictionOrder(Protocol[K]):
    """The evictable blocks of one pool or tier, the first to go first."""

    def __len__(self) -> int: ...

    def __contains__(self, key: object) -> bool: ...

    def add(self, key: K) -> None:
        """The block was used and nobody holds it now; of one prefix, the tail first."""

    def remove(self, key: K) -> None:
        """It is held again, and will be added once more. Raises KeyError for one that is not there."""

    def pop(self) -> K:
        """The block to evict, gone from the order, its uses forgotten. Raises KeyError when there is none."""


class LeastRecentlyUsed(Generic[K]):
    def __init__(self) -> None:
        self._keys: OrderedDict[K, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def add(self, key: K) -> None:
        self._keys[key] = None
        self._keys.move_to_end(key)

    def remove(self, key: K) -> None:
        del self._keys[key]

    def pop(self) -> K:
        if not self._keys:
            raise KeyError("nothing to evict")
        return self._keys.popitem(last=False)[0]


class GreedyDual(Generic[K]):
    """O(log n) a call. A heap whose entries go stale in place: the rank in `_ranks` is the one that counts."""

    def __init__(self) -> None:
        self._clock = 0
        self._order = 0
        self._uses: dict[K, int] = {}
        self._ranks: dict[K, tuple[int, int]] = {}
        self._heap: list[tuple[tuple[int, int], K]] = []

    def __len__(self) -> int:
        return len(self._ranks)

    def __contains__(self, key: object) -> bool:
        return key in self._ranks

    def add(self, key: K) -> None:
        uses = self._uses[key] = min(MAX_USES, self._uses.get(key, 0) + 1)
        self._order += 1
        rank = self._ranks[key] = (self._clock + uses, self._order)
        heapq.heappush(self._heap, (rank, key))
        if len(self._heap) > 2 * len(self._ranks) + 64:
            self._heap = [(rank, key) for key, rank in self._ranks.items()]
            heapq.heapify(self._heap)

    def remove(self, key: K) -> None:
        del self._ranks[key]

    def pop(self) -> K:
        while self._heap:
            rank, key = heapq.heappop(self._heap)
            if self._ranks.get(key) == rank:
                del self._ranks[key], self._uses[key]
                self._clock = max(self._clock, rank[0])
                return key
        raise KeyError("nothing to evict")


EVICTIONS: Mapping[str, Callable[[], EvictionOrder[bytes]]] = {
    "lru": LeastRecentlyUsed,
    "greedy-dual": GreedyDual,
}

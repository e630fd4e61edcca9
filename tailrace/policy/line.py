"""Those that wait to be computed, lowest rank first: a prefill worker's requests, a decode worker's sequences."""

import heapq
from typing import Generic, Protocol, TypeVar


class Ranked(Protocol):
    @property
    def rank(self) -> tuple[int, ...]:
        """Of its own among those that wait in one line."""
        ...


RankedT = TypeVar("RankedT", bound=Ranked)


class Line(Generic[RankedT]):
    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, ...], RankedT]] = []

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def head(self) -> RankedT | None:
        return self._heap[0][1] if self._heap else None

    def all(self) -> list[RankedT]:
        """In no order."""
        return [waiting for _, waiting in self._heap]

    def first(self, count: int) -> list[RankedT]:
        """The next `count`, in order."""
        return [waiting for _, waiting in heapq.nsmallest(count, self._heap)]

    def add(self, waiting: RankedT) -> None:
        heapq.heappush(self._heap, (waiting.rank, waiting))

    def pop(self) -> RankedT:
        """The head, which must be there."""
        return heapq.heappop(self._heap)[1]

    def discard(self, leaving: RankedT) -> None:
        """Also somebody who does not wait."""
        if any(waiting is leaving for _, waiting in self._heap):
            self._heap = [entry for entry in self._heap if entry[1] is not leaving]
            heapq.heapify(self._heap)

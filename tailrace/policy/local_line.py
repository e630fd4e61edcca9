"""Sequences that wait to be computed on a decode worker: new prompts, and those that gave way."""

import heapq

from tailrace.policy.sequence import Sequence


class LocalLine:
    """Lowest rank first."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int, int], Sequence]] = []

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def head(self) -> Sequence | None:
        return self._heap[0][1] if self._heap else None

    def sequences(self) -> list[Sequence]:
        return [sequence for _, sequence in self._heap]

    def add(self, sequence: Sequence) -> None:
        heapq.heappush(self._heap, (sequence.rank, sequence))

    def pop(self) -> Sequence:
        """The head, which must be there."""
        return heapq.heappop(self._heap)[1]

    def discard(self, sequence: Sequence) -> None:
        """Also somebody who does not wait."""
        if any(waiting is sequence for _, waiting in self._heap):
            self._heap = [entry for entry in self._heap if entry[1] is not sequence]
            heapq.heapify(self._heap)

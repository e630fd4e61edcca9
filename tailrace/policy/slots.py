"""Slots: rows of a runner's batch state, handed out lowest first so that a batch stays dense."""

import heapq


class Slots:
    """Who gets which row. A freed row is reported once, in the next plan, and may be taken again in that same plan."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count))
        self._released: list[int] = []

    def __len__(self) -> int:
        """Rows still to be had."""
        return len(self._free)

    def take(self) -> int | None:
        return heapq.heappop(self._free) if self._free else None

    def give_back(self, slot: int) -> None:
        heapq.heappush(self._free, slot)
        self._released.append(slot)

    def drain_released(self) -> list[int]:
        released, self._released = self._released, []
        return released

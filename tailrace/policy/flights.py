"""Steps that are planned and not finished: at most the one that computes and the one behind it.

What computes cannot be called back: its rows write their blocks whatever has become of their requests by then. So
nothing that is given back comes free before the youngest of these steps is over. Reads that land in a freed block are
not ordered after what computes.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from tailrace.kv.block_pool import BlockPool
from tailrace.plan import StepPlan

MAX_FLIGHTS = 2

RowsT = TypeVar("RowsT")
"""Whom a plan's rows belong to: by the time a step is finished its slots may have other owners."""


@dataclass(slots=True, eq=False)
class Flight(Generic[RowsT]):
    plan: StepPlan
    rows: RowsT
    promised: frozenset[bytes]
    """Hashes of blocks that can be found once it is finished."""
    leaving: list[list[int]] = field(default_factory=list)
    """Tables of blocks to release then."""


class Flights(Generic[RowsT]):
    """First begun, first finished."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._flights: deque[Flight[RowsT]] = deque()

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def youngest(self) -> RowsT:
        """Whom the rows of the last plan belong to."""
        return self._flights[-1].rows

    def begin(self, plan: StepPlan, rows: RowsT, promised: frozenset[bytes] = frozenset()) -> None:
        assert len(self._flights) < MAX_FLIGHTS, "a step is planned ahead of one other, not of two"
        self._flights.append(Flight(plan, rows, promised))

    def end(self, plan: StepPlan) -> RowsT:
        """The step is over; whom its rows belong to."""
        flight = self._flights.popleft()
        assert flight.plan is plan, "steps are finished in the order in which they were planned"
        for blocks in flight.leaving:
            self._pool.release(blocks)
        return flight.rows

    def release(self, blocks: list[int]) -> None:
        """Now, or when the youngest step in flight is over."""
        if self._flights:
            self._flights[-1].leaving.append(blocks)
        else:
            self._pool.release(blocks)

    def will_find(self, hashes: Sequence[bytes], num_found: int) -> bool:
        """Does a step in flight compute the block that a prompt with these hashes lacks first?"""
        return num_found < len(hashes) and any(hashes[num_found] in flight.promised for flight in self._flights)

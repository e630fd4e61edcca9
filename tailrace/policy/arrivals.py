"""Requests whose prompt is pulled from elsewhere: booked, granted a destination, landed block by block."""

from collections.abc import Sequence

from tailrace.kv.block_pool import BlockPool
from tailrace.kv.window import NOBODYS, Window
from tailrace.policy.request import Request, blocks_for
from tailrace.policy.sequence import Arrival


class Arrivals:
    """Those that wait for their blocks, by request id."""

    def __init__(self, pool: BlockPool, window: Window) -> None:
        self._pool = pool
        self._window = window
        self._arrivals: dict[int, Arrival] = {}

    def __len__(self) -> int:
        return len(self._arrivals)

    @property
    def booked_blocks(self) -> int:
        return sum(a.num_blocks for a in self._arrivals.values() if not a.is_granted)

    def all(self) -> list[Arrival]:
        return list(self._arrivals.values())

    def get(self, request_id: int) -> Arrival | None:
        return self._arrivals.get(request_id)

    def pop(self, request_id: int) -> Arrival | None:
        return self._arrivals.pop(request_id, None)

    def needed(self, request: Request) -> int:
        """Blocks that must be available to book it: its prompt's, one more, and all that are booked already."""
        return self.booked_blocks + self._arrival(request).num_blocks + 1

    def book(self, request: Request) -> None:
        self._arrivals[request.id] = self._arrival(request)

    def _arrival(self, request: Request) -> Arrival:
        num_gone = self._window.first_handed_over(len(request.tokens))
        return Arrival(request, blocks_for(len(request.tokens), self._window.block_size) - num_gone, num_gone)

    def waiting(self) -> list[Arrival]:
        """Those that want a destination, in order of rank."""
        waiting = [a for a in self._arrivals.values() if a.wanted and not a.is_granted]
        return sorted(waiting, key=lambda a: a.request.rank)

    def claim(self, arrival: Arrival, *, spare: int) -> bool:
        """The whole table at once: local blocks first. False: the pool cannot give it and keep `spare` blocks."""
        local = self._pool.find_prefix(arrival.request.hashes[arrival.num_gone :])
        self._pool.acquire(local)
        missing = arrival.num_blocks - len(local)
        fresh = self._pool.allocate_landing(missing) if self._pool.num_available >= missing + spare else None
        if fresh is None:
            self._pool.release(local)
            return False
        arrival.blocks = [*[NOBODYS] * arrival.num_gone, *local, *fresh]
        arrival.num_local = arrival.num_gone + len(local)
        return True

    def landed(self, request_id: int, blocks: Sequence[int]) -> None:
        """A read into these blocks ended well. The request may be gone by now: then they are free."""
        if (arrival := self._arrivals.get(request_id)) is None:
            self._pool.abandon_landing(blocks)
            return
        self._pool.landed(blocks)
        arrival.landed.update(blocks)

    def give_back(self, arrival: Arrival, in_flight: Sequence[int]) -> None:
        """Local and landed blocks are released, those that nobody writes freed; `in_flight` ones stay landing.

        At once, whatever computes: no step knows these blocks before the request has joined.
        """
        self._pool.release(arrival.blocks[arrival.num_gone : arrival.num_local])
        writing = set(in_flight)
        pulled = arrival.blocks[arrival.num_local :]
        self._pool.release([b for b in pulled if b in arrival.landed])
        self._pool.abandon_landing([b for b in pulled if b not in arrival.landed and b not in writing])

"""What other routers have sent to the same workers: each tells of itself, and is believed for a short time.

Two kinds of numbers keep a request from being counted twice. Seconds of prefill are all that a router has outstanding
at a worker; the pricing adds them up over all routers, and then nothing of what the worker says is waiting. Tokens and
sequences are only those that the teller does not yet expect in the worker's load report, and are added to it. No clock
in here: every call brings the time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

MARK_BYTES = 8
MAX_MARKS = 512
"""That one router tells: of the requests that it sent last."""
MAX_GIVEN = 1024
"""Prefills that one piece of news tells."""
MAX_ROUTERS = 64


class Given(NamedTuple):
    """A prefill that a router sent to a worker: what its busy share is made of."""

    worker_id: str
    prefill_s: float


@dataclass(frozen=True, slots=True)
class InFlight:
    """What one router has on its way to one worker, or all others together."""

    prefill_s: float = 0.0
    """Of all that the worker has not computed yet."""
    tokens: int = 0
    """Submitted, and not to be expected in the worker's load report yet."""
    sequences: int = 0
    """Likewise."""
    marks: frozenset[bytes] = frozenset()
    """Of blocks that will be there: see `marks_of`."""

    def __add__(self, other: "InFlight") -> "InFlight":
        """Without the marks."""
        return InFlight(self.prefill_s + other.prefill_s, self.tokens + other.tokens, self.sequences + other.sequences)


NOTHING = InFlight()


@dataclass(frozen=True, slots=True)
class RouterNews:
    """All that one router has in flight, by worker id, and what it has sent since it told last."""

    in_flight: Mapping[str, InFlight] = field(default_factory=dict)
    given: tuple[Given, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.in_flight or self.given)


@dataclass(frozen=True, slots=True)
class _Told:
    in_flight: Mapping[str, InFlight]
    holders: Mapping[bytes, Sequence[str]]
    """Worker ids by mark."""
    until_s: float


class OtherRouters:
    """What they told last. Bounded: whoever is one too many is not heard."""

    def __init__(self) -> None:
        self._told: dict[str, _Told] = {}

    def hear(self, router_id: str, in_flight: Mapping[str, InFlight], until_s: float) -> None:
        """Replaces what it said before; counts until `until_s`."""
        if not in_flight:
            self._told.pop(router_id, None)
            return
        if router_id not in self._told and len(self._told) >= MAX_ROUTERS:
            return
        holders: dict[bytes, list[str]] = {}
        for worker_id, there in in_flight.items():
            for mark in there.marks:
                holders.setdefault(mark, []).append(worker_id)
        self._told[router_id] = _Told(in_flight, holders, until_s)

    def num_heard(self, now_s: float) -> int:
        self._forget_silent(now_s)
        return len(self._told)

    def in_flight(self, now_s: float) -> dict[str, InFlight]:
        """Of all others together, by worker id; who has nothing is not named."""
        self._forget_silent(now_s)
        sums: dict[str, InFlight] = {}
        for told in self._told.values():
            for worker_id, there in told.in_flight.items():
                known = sums.get(worker_id)
                sums[worker_id] = there if known is None else known + there
        return sums

    def extend(self, hits: dict[str, int], hashes: Sequence[bytes]) -> dict[str, int]:
        """`hits`, leading blocks of `hashes` by worker, changed to what others' requests will leave where that is more.

        Of what they will leave, two thirds at least are seen.
        """
        if not self._told:
            return hits
        for depth in mark_depths(len(hashes)):
            mark = hashes[depth - 1][:MARK_BYTES]
            for told in self._told.values():
                for worker_id in told.holders.get(mark, ()):
                    hits[worker_id] = max(depth, hits.get(worker_id, 0))
        return hits

    def _forget_silent(self, now_s: float) -> None:
        for router_id in [router_id for router_id, told in self._told.items() if told.until_s <= now_s]:
            del self._told[router_id]


def mark_depths(num_blocks: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, 24 and so on: the blocks of a chain that are told, since each names all before it."""
    step = 1
    while step <= num_blocks:
        yield step
        if step > 1 and (between := step + step // 2) <= num_blocks:
            yield between
        step *= 2


def marks_of(hashes: Sequence[bytes]) -> list[bytes]:
    return [hashes[depth - 1][:MARK_BYTES] for depth in mark_depths(len(hashes))]

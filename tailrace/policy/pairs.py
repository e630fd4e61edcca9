"""How fast pairs of workers are: what a worker tells of those it reads from, and what a router makes of it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median_low
from typing import Protocol

from tailrace.messages import OwnerRate

MIN_SAMPLES = 3
"""Before which a pair has no rate of its own: the first read over a new connection says little."""
STALE_S = 60.0
"""A pair that was slower than its worker's others, or than NEUTRAL_PAIR_BYTES_PER_S, and was not used for so long is
taken to be as the others: nobody would measure again what nobody chooses."""
NEUTRAL_PAIR_BYTES_PER_S = 1e9
"""Before any transfer was measured."""
STEPS_AN_OCTAVE = 4
"""Rates are told in steps of 19 %: by noise every pair would be another, and a router would look at them all."""
_KEPT = 0.2
"""Octaves by which a rate may be off what was told before it is told anew."""


class Meter(Protocol):
    """What was measured of one pair."""

    @property
    def bytes_per_s(self) -> float: ...

    @property
    def num_samples(self) -> int: ...

    @property
    def used_s(self) -> float:
        """When it was last measured."""


class ToldRates:
    """What one worker tells of the owners that it reads from."""

    def __init__(self) -> None:
        self.rates: tuple[OwnerRate, ...] = ()
        """The same tuple until something has changed."""

    def update(self, meters: Mapping[str, Meter], now_s: float) -> None:
        """`meters`: by owner, of all that can still be read from."""
        measured = {owner: meter for owner, meter in meters.items() if meter.num_samples >= MIN_SAMPLES}
        usual = median_low(meter.bytes_per_s for meter in measured.values()) if measured else 0.0
        before = {rate.owner_id: rate.bytes_per_s for rate in self.rates}
        rates = tuple(
            OwnerRate(owner, _told(meter.bytes_per_s, before.get(owner)))
            for owner, meter in measured.items()
            if now_s - meter.used_s < STALE_S or meter.bytes_per_s >= max(usual, NEUTRAL_PAIR_BYTES_PER_S)
        )
        if rates != self.rates:
            self.rates = rates


def _told(bytes_per_s: float, before: float | None) -> float:
    octaves = math.log2(bytes_per_s)
    if before is not None and abs(octaves - math.log2(before)) < _KEPT:
        return before
    return math.exp2(round(STEPS_AN_OCTAVE * octaves) / STEPS_AN_OCTAVE)


@dataclass(frozen=True, slots=True)
class PairRates:
    """At which one worker reads from each of its owners, in bytes per second."""

    usual: float = 0.0
    """The median, which also stands in for owners that it has not measured; 0: it has measured none."""
    others: Mapping[str, float] = field(default_factory=dict)
    """Of those owners whose rate is not the usual one."""
    fastest: float = 0.0
    """Of them all."""

    @classmethod
    def of(cls, rates: Iterable[OwnerRate]) -> "PairRates":
        """Reports come from other processes: impossible rates are left out."""
        told = {rate.owner_id: rate.bytes_per_s for rate in rates if 0.0 < rate.bytes_per_s < math.inf}
        if not told:
            return cls()
        usual = median_low(told.values())
        return cls(usual, {owner: rate for owner, rate in told.items() if rate != usual}, max(told.values()))


NO_PAIRS = PairRates()

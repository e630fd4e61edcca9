"""Fetching cached blocks: how fast each pair has been, and which holder is asked for which blocks. No clock in here."""

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tailrace.kv.events import Tier
from tailrace.messages import OwnerRate
from tailrace.policy.estimates import LineFit
from tailrace.policy.pricing import Pricing
from tailrace.policy.routing import CostTerms, Held, PrefixRange, Way

NEUTRAL_WAYS: Mapping[Tier, Way] = {
    Tier.WORKER: Way(0.005, 1e-9),
    Tier.CPU: Way(0.005, 1e-9),
    Tier.NVME: Way(0.010, 1e-9),
}
"""Before anything was fetched from holders of a kind; a disk has to be read before it can be sent."""
FORGET = 0.1
"""Share of what was known of a pair that each fetch replaces."""
LEAST_SPREAD = 0.05
"""See LineFit."""
BARRED_S = 1.0
"""For which nothing is fetched over a pair whose last fetch failed; twice as long with each failure after it."""
MAX_BARRED_S = 60.0
STALE_S = 60.0
"""A pair that was slower than what is usual of its kind, and was not used for so long, is taken to be as the others."""
MAX_PAIRS = 1 << 16
"""Measured and remembered, those used last: workers come and go under new names."""
LATE_FACTOR = 4.0
"""A fetch that took so many times what it should have is not counted, unless one of the last NUM_BEFORE was late too:
its holder may have been busy, which is no property of the pair."""
NUM_BEFORE = 4
MAX_NEEDERS = 1 << 12
"""Whose told rates are remembered, those told last."""
SPLIT_GAIN = 0.75
"""Of the time from the best single holder: a second one is asked where both together take less."""
MIN_PATIENCE_S = 0.25
"""A fetch may take so long even when computing would take less: a first meeting takes some of it."""
UNKNOWN_PATIENCE_S = 1.0
"""Before anything has been computed here."""

Pair = tuple[str, str, Tier]


def patience_s(compute_s: float) -> float:
    """How long to wait for what could be computed in `compute_s` (0: not measured yet)."""
    return max(MIN_PATIENCE_S, compute_s) if compute_s > 0 else UNKNOWN_PATIENCE_S


@dataclass(slots=True)
class _Measured:
    way: Way
    fit: LineFit = field(default_factory=lambda: LineFit(FORGET, LEAST_SPREAD))
    at_s: float = 0.0
    """When it was last measured."""
    num_watched: int = 0
    """Of the next fetches, those that count even if they are late."""

    def is_excused(self, is_late: bool) -> bool:
        was_watched = self.num_watched > 0
        self.num_watched = NUM_BEFORE if is_late else max(0, self.num_watched - 1)
        return is_late and not was_watched


@dataclass(slots=True)
class _Failing:
    num_failures: int
    until_s: float


class FetchRates:
    """FetchWays from what came of fetches: by holder, needer and the tier that most of the blocks were on.

    What nobody has measured yet goes by the rate at which the needer says that it reads from the holder, else it is
    taken to be as fast as the best of its kind, and never slower than what stands in before the first measurement: a
    first fetch that was slow would be the last one of all. A pair that failed is left alone for a while, and then tried
    again at its old price.
    """

    def __init__(self) -> None:
        self._pairs: OrderedDict[Pair, _Measured] = OrderedDict()
        self._best: dict[Tier, tuple[Pair, Way]] = {}
        self._failing: OrderedDict[tuple[str, str], _Failing] = OrderedDict()
        self._barred: dict[tuple[str, str], float] = {}
        self._told: OrderedDict[str, Mapping[str, float]] = OrderedDict()
        self._now_s = 0.0

    def way(self, holder_id: str, needer_id: str, tier: Tier) -> Way | None:
        if self._barred and (holder_id, needer_id) in self._barred:
            return None
        usual = NEUTRAL_WAYS[tier]
        known = self._pairs.get((holder_id, needer_id, tier))
        if known is not None and (known.way.s_per_byte <= usual.s_per_byte or self._now_s - known.at_s < STALE_S):
            return known.way
        if tier is not Tier.NVME and (rate := self._told.get(needer_id, {}).get(holder_id)):
            return Way(usual.overhead_s, 1.0 / rate)
        best = self._best.get(tier)
        return best[1] if best is not None and best[1].s_per_byte < usual.s_per_byte else usual

    def told(self, needer_id: str, rates: Iterable[OwnerRate]) -> None:
        """By a needer, of all whom it reads from; in place of what it told before."""
        self._told[needer_id] = {rate.owner_id: rate.bytes_per_s for rate in rates if 0.0 < rate.bytes_per_s < math.inf}
        self._told.move_to_end(needer_id)
        if len(self._told) > MAX_NEEDERS:
            self._told.popitem(last=False)

    def advance(self, now_s: float) -> None:
        """Pairs that have been left alone for long enough may be tried again. `now_s` never goes back."""
        self._now_s = now_s
        if self._barred:
            self._barred = {pair: until_s for pair, until_s in self._barred.items() if until_s > now_s}

    def succeeded(self, holder_id: str, needer_id: str, tier: Tier, num_bytes: int, seconds: float) -> None:
        """An impossible measurement is ignored: reports come from other processes."""
        if num_bytes < 1 or not 0.0 < seconds < math.inf:
            return
        self._failing.pop((holder_id, needer_id), None)
        self._barred.pop((holder_id, needer_id), None)
        expected = self.way(holder_id, needer_id, tier) or NEUTRAL_WAYS[tier]
        pair = (holder_id, needer_id, tier)
        measured = self._pairs.get(pair)
        if measured is None or self._now_s - measured.at_s >= STALE_S:
            measured = self._pairs[pair] = _Measured(expected)
        self._pairs.move_to_end(pair)
        if len(self._pairs) > MAX_PAIRS:
            gone, _ = self._pairs.popitem(last=False)
            self._rank(gone)
        measured.at_s = self._now_s
        if not measured.is_excused(seconds > LATE_FACTOR * (expected.overhead_s + num_bytes * expected.s_per_byte)):
            measured.fit.add(float(num_bytes), seconds)
            measured.way = _way(measured.fit, NEUTRAL_WAYS[tier].overhead_s)
            self._rank(pair)

    def failed(self, holder_id: str, needer_id: str, now_s: float) -> None:
        """Nothing came of a fetch: the holder was away, late or unwilling, or no longer had the blocks."""
        pair = (holder_id, needer_id)
        known = self._failing.get(pair)
        if known is not None and now_s < known.until_s:
            # Sent before the first of them was known to fail.
            return
        count = known.num_failures + 1 if known is not None else 1
        until_s = now_s + min(MAX_BARRED_S, BARRED_S * 2.0 ** min(count - 1, 10))
        self._failing[pair] = _Failing(count, until_s)
        self._failing.move_to_end(pair)
        self._barred[pair] = until_s
        if len(self._failing) > MAX_PAIRS:
            gone, _ = self._failing.popitem(last=False)
            self._barred.pop(gone, None)

    def _rank(self, changed: Pair) -> None:
        """Keeps the fastest of the pair's kind; all are looked at only where the fastest one has changed."""
        tier = changed[2]
        best = self._best.get(tier)
        known = self._pairs.get(changed)
        if known is not None and (best is None or known.way.s_per_byte <= best[1].s_per_byte):
            self._best[tier] = (changed, known.way)
        elif best is not None and best[0] == changed:
            kind = ((pair, each.way) for pair, each in self._pairs.items() if pair[2] is tier)
            fastest = min(kind, key=lambda item: item[1].s_per_byte, default=None)
            if fastest is None:
                del self._best[tier]
            else:
                self._best[tier] = fastest


def _way(fit: LineFit, usual_overhead_s: float) -> Way:
    """Where fetches were all of one length, their fixed cost cannot be told apart, and is taken to be the usual one."""
    num_bytes, seconds = fit.means
    slope = fit.slope
    if slope is None:
        overhead_s = min(usual_overhead_s, seconds / 2)
        return Way(overhead_s, (seconds - overhead_s) / num_bytes)
    overhead_s = seconds - slope * num_bytes
    if slope <= 0.0 or overhead_s <= 0.0:
        # No fixed cost: the line through the origin.
        return Way(0.0, seconds / num_bytes)
    return Way(overhead_s, slope)


def split_ranges(prices: Pricing, chosen: CostTerms) -> tuple[PrefixRange, ...]:
    """Whom the worker that prefills asks for what: one holder, or two at once where that is much faster.

    With two, the deeper one gives the end. Both are taken to reach their own rates, which is why a small gain is none.
    """
    if not chosen.fetch_blocks:
        return ()
    needer_id = chosen.prefill_id or chosen.decode_id
    sources = {held.holder_id: held for held in prices.sources_for(needer_id)}
    deep = sources[chosen.holder_id]
    first, end = deep.depth - chosen.fetch_blocks, deep.depth
    best: tuple[PrefixRange, ...] = (_range(deep, first, end),)
    if prices.span:
        # Others hold what is needed at their own depth.
        return best
    best_s = SPLIT_GAIN * prices.fetch_s(deep, needer_id, first)
    for other in sources.values():
        if other.holder_id in (deep.holder_id, needer_id) or other.depth <= first:
            continue
        cut = _cut(prices, needer_id, first, end, other, deep)
        if not first < cut < end:
            continue
        seconds = max(prices.fetch_s(other, needer_id, first, cut), prices.fetch_s(deep, needer_id, cut, end))
        if seconds < best_s:
            best_s = seconds
            best = (_range(other, first, cut), _range(deep, cut, end))
    return best


def _range(held: Held, first: int, end: int) -> PrefixRange:
    return PrefixRange(held.holder_id, first, end - first, held.is_store, held.on_disk_of(first, end))


def _cut(prices: Pricing, needer_id: str, first: int, end: int, head: Held, tail: Held) -> int:
    """Where both take as long, as if each had one rate for all of its blocks."""
    limit = min(head.depth, end)
    head_s, tail_s = prices.fetch_s(head, needer_id, first, limit), prices.fetch_s(tail, needer_id, first, end)
    if not (math.isfinite(head_s) and math.isfinite(tail_s)) or head_s + tail_s <= 0.0:
        return first
    head_block_s, tail_block_s = head_s / (limit - first), tail_s / (end - first)
    cut = first + round((end - first) * tail_block_s / (head_block_s + tail_block_s))
    return min(cut, limit)

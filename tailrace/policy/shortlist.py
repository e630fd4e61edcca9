"""Who cannot serve a request cheapest, seen without pricing everybody.

A bound below a worker's price takes a tenth of the time of the price. Of either side the cheapest is found, a decode
worker as if over its fastest pair; whoever's bound is beyond that price is in no pair that costs less than those two
together. Where the pair of the two has a slower link, that is what bounds may be beyond as well. Among those who are
left the choice is made as ever (see `choosing`), so that it is the same.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tailrace.policy.pricing import (
    MAX_CURVE_S,
    MAX_PRICE_US,
    DecodePrice,
    Neutral,
    Pricing,
    decode_steps,
    measured,
    microseconds,
    step_seconds,
)
from tailrace.policy.routing import Preferred, WorkerView

FEW = 8
"""Workers of one side, at most, who are all left: bounds would gain nothing."""
_SHORT = 1.0 - 1e-9
"""Bounds and prices are sums of the same terms in another order; times this, a bound stays below all the same."""
_UNMEASURED = Neutral(0.0, 0.0, 0.0)


@dataclass(slots=True, eq=False)
class _Traits:
    """What bounds need of one view. (No tuple: the fields of a class with slots are read in a quarter of the time.)"""

    view: WorkerView
    worker_id: str
    fingerprint: bytes
    capacity: float
    """Blocks of the longest request that it can take."""
    prefill_rate: float
    """As all rates: 0 where it is not measured."""
    curve_s: float
    said_tokens: int
    """Of prefill that it says are waiting."""
    crowd: int
    """Sequences that would wait for a prefill on a decode worker, and itself."""
    step_s: float
    pair_rate: float
    """Of pairs without a rate of their own."""
    fastest_rate: float
    """Of any pair."""
    has_own_pairs: bool
    load_s: float
    """Of one more sequence, if there is room; at least."""
    step_tokens: float
    """That it prefills in the time of one of its steps; at most."""

    @classmethod
    def of(cls, view: WorkerView) -> "_Traits":
        rate = measured(view.prefill_tokens_per_s, 0.0)
        batch, most = view.num_sequences + 1, max(1, view.max_num_seqs)
        longest_s = max(step_seconds(view, most, _UNMEASURED), measured(view.decode_step_s, 0.0))
        # Without reserved tokens, which take blocks of a size that the request brings.
        steps = decode_steps(view, batch, 1, max(1, view.reserved_tokens))
        return cls(
            view,
            view.worker_id,
            view.fingerprint,
            -1.0 if view.draining else view.total_blocks or math.inf,
            rate,
            view.prefill_curve_s if 0.0 < view.prefill_curve_s < MAX_CURVE_S else 0.0,
            view.waiting_tokens,
            1 + view.num_sequences,
            measured(view.decode_step_s, 0.0),
            (pair_rate := measured(view.transfer_bytes_per_s, 0.0)),
            max(pair_rate, view.pairs.fastest) if pair_rate else 0.0,
            bool(view.pairs.others),
            step_seconds(view, batch, _UNMEASURED) * steps,
            longest_s * rate if rate and longest_s else math.inf,
        )


@dataclass(frozen=True, slots=True)
class Shortlist:
    """Those who are left."""

    prefills: Sequence[WorkerView]
    decodes: Sequence[WorkerView]


class Traits:
    """What was read of each worker's view, until it has another one."""

    def __init__(self) -> None:
        self._read: dict[str, _Traits] = {}

    def of(self, prefills: Sequence[WorkerView], decodes: Sequence[WorkerView]) -> "Bounds":
        if len(self._read) > 2 * (len(prefills) + len(decodes)):
            self._read.clear()
        return Bounds(self._rows(prefills), self._rows(decodes))

    def _rows(self, views: Sequence[WorkerView]) -> list[_Traits]:
        read = self._read
        rows = []
        for view in views:
            row = read.get(view.worker_id)
            if row is None or row.view is not view:
                row = read[view.worker_id] = _Traits.of(view)
            rows.append(row)
        return rows


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of all workers, for one request."""

    prefills: Sequence[_Traits]
    decodes: Sequence[_Traits]

    def neutral(self) -> Neutral:
        """As `pricing.neutral_rates` of the same workers."""
        rows = (*self.prefills, *self.decodes)
        steps = [row.step_s for row in rows if row.step_s]
        return Neutral.of(
            max([row.prefill_rate for row in rows], default=0.0),
            min(steps, default=0.0),
            max([row.pair_rate for row in rows], default=0.0),
        )

    def shortlist(self, prices: Pricing) -> Shortlist:
        """Among whom the cheapest pair is, and the session's last one.

        Everybody where there are few, and where layouts differ: the best of one side may then fit nobody.
        """
        blocks = prices.prompt_blocks
        prefills = [row for row in self.prefills if row.capacity >= blocks]
        decodes = [row for row in self.decodes if row.capacity > blocks]
        few = len(prefills) <= FEW and len(decodes) <= FEW
        if few or not prefills or not decodes or len({row.fingerprint for row in (*prefills, *decodes)}) > 1:
            return Shortlist([row.view for row in self.prefills], [row.view for row in self.decodes])
        sources, targets = _Side.of_prefills(prices, prefills), _Side.of_decodes(prices, decodes)
        slack_us = _slack_us(prices, sources, targets) if targets.has_own_pairs else 0
        left = sources.within(slack_us), targets.within(slack_us)
        pair_us = sources.least_us + targets.least_us + slack_us
        _add(left[1], _locals(prices, decodes, pair_us))
        if prices.live.preferred is not None:
            _keep(prices, prices.live.preferred, sources, targets, left)
        return Shortlist(*([row.view for row in rows] for rows in left))


@dataclass(frozen=True, slots=True)
class _Side:
    """Prefill or decode workers, with what each costs at least."""

    rows: Sequence[_Traits]
    bounds_s: Sequence[float]
    cheapest: _Traits
    least_us: int
    """Its price, which no other's is below."""

    @classmethod
    def of(cls, rows: Sequence[_Traits], bounds_s: Sequence[float], price_us: Callable[[_Traits], int]) -> "_Side":
        """Prices one after the other, in the order of their bounds, until nobody can be cheaper."""
        cheapest = rows[bounds_s.index(min(bounds_s))]
        least_us = price_us(cheapest)
        limit_s = _limit_s(least_us)
        within = [at for at, bound_s in enumerate(bounds_s) if bound_s <= limit_s]
        for at in sorted(within, key=bounds_s.__getitem__) if len(within) > 1 else ():
            if bounds_s[at] > limit_s:
                break
            if (found_us := price_us(rows[at])) < least_us:
                cheapest, least_us = rows[at], found_us
                limit_s = _limit_s(least_us)
        return cls(rows, bounds_s, cheapest, least_us)

    @classmethod
    def of_prefills(cls, prices: Pricing, rows: Sequence[_Traits]) -> "_Side":
        return cls.of(rows, _prefill_bounds_s(prices, rows), lambda row: prices.prefill(row.view).price_us)

    @classmethod
    def of_decodes(cls, prices: Pricing, rows: Sequence[_Traits]) -> "_Side":
        """Each as if over its fastest pair."""
        return cls.of(rows, _decode_bounds_s(prices, rows), lambda row: _least_us(prices.decode(row.view)))

    @property
    def has_own_pairs(self) -> bool:
        return any(row.has_own_pairs for row in self.rows)

    def within(self, slack_us: int) -> list[_Traits]:
        """Those who may cost no more than the cheapest and so much."""
        limit_s = _limit_s(self.least_us + slack_us)
        return [row for row, bound_s in zip(self.rows, self.bounds_s, strict=True) if bound_s <= limit_s]


def _slack_us(prices: Pricing, sources: _Side, targets: _Side) -> int:
    """By which the best pair that is found at once is dearer than either side's cheapest, over its fastest pair."""
    source_id, target = sources.cheapest.worker_id, prices.decode(targets.cheapest.view)
    slack_us = _pair_us(target, source_id) - targets.least_us
    if not slack_us:
        return 0
    others = [_pair_us(prices.decode(row.view), source_id) for row in targets.within(slack_us)]
    slack_us = min(slack_us, min(others) - targets.least_us)
    both = [prices.prefill(row.view).price_us + _pair_us(target, row.worker_id) for row in sources.within(slack_us)]
    return min(slack_us, min(both) - sources.least_us - targets.least_us)


def _least_us(price: DecodePrice) -> int:
    return microseconds(price.load_s + (price.least_transfer_s if price.pairs.others else price.transfer_s))


def _pair_us(price: DecodePrice, prefill_id: str) -> int:
    return microseconds(price.load_s + price.transfer_from(prefill_id))


def _keep(
    prices: Pricing,
    preferred: Preferred,
    sources: _Side,
    targets: _Side,
    left: tuple[list[_Traits], list[_Traits]],
) -> None:
    """The session's last pair, and whom the links of either half of it make the best for that half."""
    source = next((row for row in sources.rows if row.worker_id == preferred.prefill_id), None)
    target = next((row for row in targets.rows if row.worker_id == preferred.decode_id), None)
    if source is not None:
        _add(left[0], [source])
        if targets.has_own_pairs:
            _add(left[1], _targets_of(prices, source.worker_id, targets.rows).within(0))
    if target is not None:
        _add(left[1], [target])
        if target.has_own_pairs:
            _add(left[0], _sources_of(prices, target, sources).within(0))


def _add(rows: list[_Traits], more: Sequence[_Traits]) -> None:
    """Those who are not there."""
    known = {row.worker_id for row in rows} if more else ()
    rows += [row for row in more if row.worker_id not in known]


def _targets_of(prices: Pricing, source_id: str, rows: Sequence[_Traits]) -> _Side:
    bounds_s = _decode_bounds_s(prices, rows, source_id)
    return _Side.of(rows, bounds_s, lambda row: _pair_us(prices.decode(row.view), source_id))


def _sources_of(prices: Pricing, target: _Traits, sources: _Side) -> _Side:
    price = prices.decode(target.view)
    bounds_s = [
        bound_s + price.load_s + price.transfer_from(row.worker_id)
        for row, bound_s in zip(sources.rows, sources.bounds_s, strict=True)
    ]
    return _Side.of(
        sources.rows,
        bounds_s,
        lambda row: prices.prefill(row.view).price_us + _pair_us(price, row.worker_id),
    )


def _limit_s(limit_us: int) -> float:
    """A worker whose bound is beyond it has a price above `limit_us`."""
    return (limit_us + 1) / (1e6 * _SHORT) if limit_us < MAX_PRICE_US else math.inf


def _prefill_bounds_s(prices: Pricing, rows: Sequence[_Traits]) -> list[float]:
    """As if the deepest prefix that anybody lends were fetched in no time."""
    hits, waiting, backlogs = prices.hits, prices.live.waiting, prices.live.backlog_s or {}
    sent = prices.live.backlog_tokens
    depth = _deepest(prices)
    rest, squares = _rest(prices, depth)
    bounds_s = []
    for row in rows:
        worker_id = row.worker_id
        if not row.prefill_rate:
            bounds_s.append(0.0)
            continue
        own = hits.get(worker_id, 0)
        tokens, curve = _rest(prices, own) if own > depth else (rest, squares)
        queue_s, others = backlogs.get(worker_id, 0.0), row.said_tokens - sent.get(worker_id, 0.0)
        if others > 0.0:
            queue_s += others / row.prefill_rate
        compute_s = tokens / row.prefill_rate + row.curve_s * curve
        bounds_s.append(queue_s + compute_s * (1.0 + waiting.get(worker_id, 0.0)))
    return bounds_s


def _deepest(prices: Pricing) -> int:
    """Blocks of the longest prefix that anybody lends."""
    return prices.holders[0].depth if prices.holders else 0


def _rest(prices: Pricing, hit_blocks: int) -> tuple[int, int]:
    """Tokens to compute after so many blocks, and the squares that the curve multiplies."""
    total = prices.request.num_prompt_tokens
    cached = prices.request.cached_tokens(hit_blocks)
    return total - cached, total * total - cached * cached


def _decode_bounds_s(prices: Pricing, rows: Sequence[_Traits], source_id: str | None = None) -> list[float]:
    """Over each one's pair with `source_id`; None: over its fastest one."""
    bounds_s = []
    for row in rows:
        missing_bytes = prices.missing_blocks(row.worker_id) * prices.block_bytes
        rate = row.fastest_rate
        if source_id is not None:
            rate = row.view.pairs.others.get(source_id, row.pair_rate)
        bounds_s.append(row.load_s + (missing_bytes / rate if rate else 0.0))
    return bounds_s


def _locals(prices: Pricing, rows: Sequence[_Traits], limit_us: int) -> list[_Traits]:
    """Those who may prefill by themselves, and for whom that and the load may cost no more than `limit_us`.

    As if the deepest prefix that anybody lends were fetched in no time.
    """
    request, hits, backlogs = prices.request, prices.hits, prices.live.backlog_s or {}
    if not request.local_prefill:
        return []
    depth, limit_s = _deepest(prices), _limit_s(limit_us)
    rest = _rest(prices, depth)
    guess = prices.neutral.local_tokens_per_s
    found = []
    for row in rows:
        own = hits.get(row.worker_id, 0)
        tokens, squares = _rest(prices, own) if own > depth else rest
        if tokens * _SHORT > row.step_tokens and tokens > request.block_size:
            continue
        rate = row.prefill_rate or guess
        others = max(0.0, row.said_tokens - prices.live.backlog_tokens.get(row.worker_id, 0.0))
        queue_s = backlogs.get(row.worker_id, 0.0) + others / rate
        compute_s = tokens / rate + row.curve_s * squares
        if queue_s + compute_s * row.crowd + row.load_s <= limit_s:
            found.append(row)
    return found

"""Who cannot serve a request cheapest, seen without pricing everybody.

A bound below a worker's price takes a tenth of the time of the price. Of either side the worker with the lowest bound
is priced; whoever's bound is beyond that price is not the best of its side, and the best pair is that of the two best
(see `choosing`). Among those who are left the choice is made as ever, so that it is the same.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tailrace.policy.pricing import (
    MAX_CURVE_S,
    MAX_PRICE_US,
    Neutral,
    Pricing,
    decode_steps,
    measured,
    microseconds,
    step_seconds,
)
from tailrace.policy.routing import WorkerView

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
            measured(view.transfer_bytes_per_s, 0.0),
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
        """As `pricing.neutral_rates` of the same workers, where no pair has a bandwidth of its own."""
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
        preferred = prices.live.preferred
        sources, source_us = _best(
            prefills, _prefill_bounds_s(prices, prefills), lambda row: prices.prefill(row.view).price_us
        )
        targets, target_us = _best(decodes, _decode_bounds_s(prices, decodes), lambda row: _target_us(prices, row))
        chosen_ids = {row.worker_id for row in targets}
        targets += [row for row in _locals(prices, decodes, source_us + target_us) if row.worker_id not in chosen_ids]
        if preferred is not None:
            _keep(sources, prefills, preferred.prefill_id)
            _keep(targets, decodes, preferred.decode_id)
        return Shortlist([row.view for row in sources], [row.view for row in targets])


def _target_us(prices: Pricing, row: _Traits) -> int:
    price = prices.decode(row.view)
    return microseconds(price.load_s + price.transfer_s)


def _best(
    rows: Sequence[_Traits], bounds_s: list[float], price_us: Callable[[_Traits], int]
) -> tuple[list[_Traits], int]:
    """Those whose bounds are not beyond the price of the one with the lowest, and that price."""
    limit = price_us(rows[bounds_s.index(min(bounds_s))])
    limit_s = _limit_s(limit)
    return [row for row, bound_s in zip(rows, bounds_s, strict=True) if bound_s <= limit_s], limit


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


def _decode_bounds_s(prices: Pricing, rows: Sequence[_Traits]) -> list[float]:
    bounds_s = []
    for row in rows:
        missing_bytes = prices.missing_blocks(row.worker_id) * prices.block_bytes
        bounds_s.append(row.load_s + (missing_bytes / row.pair_rate if row.pair_rate else 0.0))
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


def _keep(kept: list[_Traits], rows: Sequence[_Traits], worker_id: str) -> None:
    if all(row.worker_id != worker_id for row in kept):
        kept += [row for row in rows if row.worker_id == worker_id]

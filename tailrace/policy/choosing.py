"""Which pair of workers serves a request, by one of four policies over the same prices.

`cost` takes the lowest price. The deepest prefix match alone never wins: when most prompts share their first block, it
would send all to one worker. `prefix` does just that, `least-loaded` looks at queues only and `round-robin` at nothing:
they are there to compare with.

Every policy ranks a pair by numbers that are the sum of the prefill worker's and the decode worker's own, in order, and
then by their ids. The lowest such sum is that of the two lowest, so that nobody looks at all pairs; where single pairs
have a measured bandwidth, only at those that can still be cheaper than the best so far.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from tailrace.policy.fetching import split_ranges
from tailrace.policy.pricing import DecodePrice, PrefillPrice, Pricing, is_eligible, microseconds, terms_of
from tailrace.policy.routing import CostTerms, Live, Preferred, Route, RouteRequest, WorkerView
from tailrace.policy.shortlist import Traits

SESSION_MARGIN = 0.05
"""Share of the best price by which the pair of the session's last request may be dearer, and still be taken."""

Numbers = tuple[int, int, int]
Rank = tuple[int, int, int, str, str]


class _Source(NamedTuple):
    """A prefill worker, or a decode worker for itself. Sorts by its rank."""

    numbers: Numbers
    worker_id: str
    price: PrefillPrice


class _Target(NamedTuple):
    numbers: Numbers
    """With the transfer from an owner whose pair is not measured."""
    worker_id: str
    price: DecodePrice
    local: PrefillPrice | None
    """Where it may prefill by itself."""


class _Pair(NamedTuple):
    rank: Rank
    source: PrefillPrice
    target: DecodePrice


@dataclass(frozen=True, slots=True)
class _Ring:
    """Whose turn it is."""

    prefill_ids: Mapping[str, int]
    decode_ids: Mapping[str, int]
    turn: int


_NO_RING = _Ring({}, {}, 0)


@dataclass(frozen=True, slots=True)
class Policy:
    """How a policy ranks either side of a pair. The last number is the load, by which ties are broken."""

    source: Callable[[PrefillPrice, _Ring], Numbers]
    target: Callable[[DecodePrice, float, _Ring], Numbers]
    """The float: seconds of the transfer."""
    counts_transfer: bool = False
    takes_turns: bool = False


def _place(worker_id: str, ids: Mapping[str, int], turn: int) -> int:
    """How far on in the ring of candidates the worker stands from the one whose turn it is; not in it: at its end."""
    return (ids[worker_id] - turn) % len(ids) if worker_id in ids else len(ids)


POLICIES: Mapping[str, Policy] = {
    "cost": Policy(
        lambda price, _: (price.price_us, price.num_sequences, 0),
        lambda price, transfer_s, _: (microseconds(price.load_s + transfer_s), price.num_sequences, 0),
        counts_transfer=True,
    ),
    "round-robin": Policy(
        lambda price, ring: (_place(price.worker_id, ring.prefill_ids, ring.turn), 0, 0),
        lambda price, _, ring: (0, _place(price.worker_id, ring.decode_ids, ring.turn), 0),
        takes_turns=True,
    ),
    "least-loaded": Policy(
        lambda price, _: (microseconds(price.queue_s), price.num_sequences, 0),
        lambda price, _, __: (microseconds(price.load_s), price.num_sequences, 0),
    ),
    "prefix": Policy(
        lambda price, _: (-price.hit_blocks, microseconds(price.queue_s), price.num_sequences),
        lambda price, _, __: (0, microseconds(price.load_s), price.num_sequences),
    ),
}


@dataclass(frozen=True, slots=True)
class Candidates:
    """Everybody who could take a part of one request, with their prices."""

    prices: Pricing
    policy: Policy
    ring: _Ring
    sources: Mapping[bytes, Sequence[_Source]]
    """By layout, the best first."""
    targets: Sequence[_Target]

    def sources_of(self, target: _Target) -> Sequence[_Source]:
        return self.sources.get(target.price.fingerprint, ())

    def best(self) -> _Pair | None:
        pairs = [*self._best_pairs(), *self._locals(self.targets)]
        return min(pairs, default=None, key=_rank)

    def _best_pairs(self) -> list[_Pair]:
        if self.policy.counts_transfer and self.prices.pair_bytes_per_s:
            return [pair for pair in (self._search(),) if pair is not None]
        best: list[_Pair] = []
        for fingerprint, sources in self.sources.items():
            fitting = [target for target in self.targets if target.price.fingerprint == fingerprint]
            if sources and fitting:
                source, target = sources[0], min(fitting)
                best.append(
                    _Pair(_sum(source.numbers, target.numbers, source.worker_id, target), *_prices(source, target))
                )
        return best

    def _search(self) -> _Pair | None:
        """The best pair where bandwidths are pairs' own: bounds come from the fastest one."""
        bounds = [
            (self.policy.target(t.price, self.prices.least_transfer_s(t.price), self.ring), t.worker_id, t)
            for t in self.targets
        ]
        best: _Pair | None = None
        for least, _, target in sorted(bounds):
            for source in self.sources_of(target):
                if best is not None and source.numbers[0] + least[0] > best.rank[0]:
                    break
                pair = self.pair(source, target)
                if best is None or pair.rank < best.rank:
                    best = pair
        return best

    def pair(self, source: _Source, target: _Target) -> _Pair:
        numbers = target.numbers
        if self.policy.counts_transfer and self.prices.pair_bytes_per_s:
            transfer_s = self.prices.transfer_s(source.worker_id, target.price)
            numbers = self.policy.target(target.price, transfer_s, self.ring)
        return _Pair(_sum(source.numbers, numbers, source.worker_id, target), *_prices(source, target))

    def _locals(self, targets: Sequence[_Target]) -> list[_Pair]:
        return [
            _Pair(
                _sum(
                    self.policy.source(target.local, self.ring),
                    self.policy.target(target.price, 0.0, self.ring),
                    "",
                    target,
                ),
                target.local,
                target.price,
            )
            for target in targets
            if target.local is not None
        ]

    def prefer(self, best: _Pair, preferred: Preferred) -> _Pair:
        """The pair of the session's last request, or half of it, where that costs hardly more."""
        limit = best.rank[0] * (1.0 + SESSION_MARGIN)
        decodes = [target for target in self.targets if target.worker_id == preferred.decode_id]
        prefills = [
            (source, target)
            for target in self.targets
            for source in self.sources_of(target)
            if source.worker_id == preferred.prefill_id
        ]
        both = [pair for pair in prefills if pair[1].worker_id == preferred.decode_id]
        own = [] if preferred.prefill_id else self._locals(decodes)
        one = [(source, target) for target in decodes for source in self.sources_of(target)]
        for group in (both, prefills, one):
            pairs = [*own, *(self.pair(*each) for each in group)]
            nearest = min(pairs, default=None, key=_rank)
            if nearest is not None and nearest.rank[0] <= limit:
                return nearest
        return best

    def terms(self) -> tuple[CostTerms, ...]:
        found: list[CostTerms] = []
        for target in self.targets:
            found += [self.terms_of(source.price, target.price) for source in self.sources_of(target)]
            if target.local is not None:
                found.append(self.terms_of(target.local, target.price))
        return tuple(found)

    def terms_of(self, source: PrefillPrice, target: DecodePrice) -> CostTerms:
        return terms_of(source, target, self.prices.transfer_s(source.worker_id, target))


def _rank(pair: _Pair) -> Rank:
    return pair.rank


def _prices(source: _Source, target: _Target) -> tuple[PrefillPrice, DecodePrice]:
    return source.price, target.price


def _sum(a: Numbers, b: Numbers, prefill_id: str, target: _Target) -> Rank:
    return (a[0] + b[0], a[1] + b[1], a[2] + b[2], prefill_id, target.worker_id)


def choose(
    request: RouteRequest,
    prefills: Sequence[WorkerView],
    decodes: Sequence[WorkerView],
    hits: Mapping[str, int],
    pair_bytes_per_s: Mapping[tuple[str, str], float],
    bytes_per_token: int,
    *,
    live: Live | None = None,
    policy: str = "cost",
    traits: Traits | None = None,
) -> Route | None:
    """The best pair by `policy`, one of POLICIES; None when there is none.

    `hits`: leading blocks of the prompt that a worker or a store holds. `pair_bytes_per_s`: measured, by (prefill id,
    decode id), where a pair's bandwidth is not that of its decode worker. No candidates are draining workers, workers
    whose pool can never hold the prompt, and pairs of different layouts. A decode worker prefills by itself where no
    prefill worker of its layout is eligible; it competes with them where its uncached rest holds its batch up for one
    of its steps at most. Ties go to the least loaded pair, then to the lowest ids. `traits`: of the same workers, from
    one request to the next; with them only those are priced that may be chosen.
    """
    live = live or Live()
    looked = traits.of(prefills, decodes) if traits is not None and policy == "cost" and not pair_bytes_per_s else None
    neutral = looked.neutral() if looked is not None else None
    prices = Pricing.of(request, prefills, decodes, hits, pair_bytes_per_s, bytes_per_token, live, neutral)
    explained = partial(_candidates, prices, prefills, decodes, POLICIES[policy])
    if looked is None:
        candidates = explained()
    else:
        left = looked.shortlist(prices)
        candidates = _candidates(prices, left.prefills, left.decodes, POLICIES[policy])
    best = candidates.best()
    if best is None:
        return None
    if live.preferred is not None and policy == "cost":
        best = candidates.prefer(best, live.preferred)
    chosen = candidates.terms_of(best.source, best.target)
    return Route(chosen, lambda: explained().terms(), sources=split_ranges(prices, chosen))


def _candidates(
    prices: Pricing, prefills: Sequence[WorkerView], decodes: Sequence[WorkerView], policy: Policy
) -> Candidates:
    ring = _Ring(_order(prefills), _order(decodes), prices.live.turn) if policy.takes_turns else _NO_RING
    sources: dict[bytes, list[_Source]] = {}
    for view in prefills:
        if is_eligible(view, prices.prompt_blocks):
            price = prices.prefill(view)
            sources.setdefault(view.fingerprint, []).append(_Source(policy.source(price, ring), view.worker_id, price))
    for ranked in sources.values():
        ranked.sort()
    targets = []
    for view in decodes:
        # A block beyond the prompt's, to go on in.
        if is_eligible(view, prices.prompt_blocks + 1):
            target = prices.decode(view)
            local = _local(prices, view, target, is_alone=view.fingerprint not in sources)
            if local is not None or view.fingerprint in sources:
                numbers = policy.target(target, target.transfer_s, ring)
                targets.append(_Target(numbers, view.worker_id, target, local))
    return Candidates(prices, policy, ring, sources, targets)


def _local(prices: Pricing, view: WorkerView, target: DecodePrice, *, is_alone: bool) -> PrefillPrice | None:
    if not prices.request.local_prefill:
        return None
    # With others to prefill, it must not hold its batch up for more than one of its steps.
    return prices.local(view, math.inf if is_alone else target.step_s)


def _order(views: Sequence[WorkerView]) -> dict[str, int]:
    return {worker_id: place for place, worker_id in enumerate(sorted(view.worker_id for view in views))}

"""Which pair of workers serves a request, by one of four policies over the same prices.

`cost` takes the lowest price. The deepest prefix match alone never wins: when most prompts share their first block, it
would send all to one worker. `prefix` does just that, `least-loaded` looks at queues only and `round-robin` at nothing:
they are there to compare with.

Every policy ranks a pair by numbers that are the sum of the prefill worker's and the decode worker's own, in order, and
then by their ids. The lowest such sum is that of the two lowest, so that nobody looks at all pairs; where single pairs
have rates of their own, only at those that can still be cheaper than the best so far.
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
    """With the transfer from an owner whose pair has no rate of its own."""
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
        best = self._search()
        pairs = [*self._locals(self.targets), *([best] if best is not None else [])]
        return min(pairs, default=None, key=_rank)

    def _search(self) -> _Pair | None:
        """Target by target, the one that could be cheapest first; of its sources those up to the first over whose pair
        nothing takes longer than over its fastest one: whoever comes after that is dearer."""
        best: _Pair | None = None
        for least, _, target in sorted((self._least(target), target.worker_id, target) for target in self.targets):
            for source in self.sources_of(target):
                if best is not None and source.numbers[0] + least[0] > best.rank[0]:
                    break
                numbers = self._numbers(source, target)
                pair = _Pair(_sum(source.numbers, numbers, source.worker_id, target), source.price, target.price)
                if best is None or pair.rank < best.rank:
                    best = pair
                if numbers == least:
                    break
        return best

    def _least(self, target: _Target) -> Numbers:
        """Over its fastest pair."""
        if not self._has_own_pairs(target):
            return target.numbers
        return self.policy.target(target.price, target.price.least_transfer_s, self.ring)

    def _numbers(self, source: _Source, target: _Target) -> Numbers:
        if not self._has_own_pairs(target) or source.worker_id not in target.price.pairs.others:
            return target.numbers
        return self.policy.target(target.price, target.price.transfer_from(source.worker_id), self.ring)

    def _has_own_pairs(self, target: _Target) -> bool:
        return self.policy.counts_transfer and bool(target.price.pairs.others)

    def pair(self, source: _Source, target: _Target) -> _Pair:
        numbers = self._numbers(source, target)
        return _Pair(_sum(source.numbers, numbers, source.worker_id, target), source.price, target.price)

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
            found += [terms_of(source.price, target.price) for source in self.sources_of(target)]
            if target.local is not None:
                found.append(terms_of(target.local, target.price))
        return tuple(found)


def _rank(pair: _Pair) -> Rank:
    return pair.rank


def _sum(a: Numbers, b: Numbers, prefill_id: str, target: _Target) -> Rank:
    return (a[0] + b[0], a[1] + b[1], a[2] + b[2], prefill_id, target.worker_id)


def choose(
    request: RouteRequest,
    prefills: Sequence[WorkerView],
    decodes: Sequence[WorkerView],
    hits: Mapping[str, int],
    bytes_per_token: int,
    *,
    live: Live | None = None,
    policy: str = "cost",
    traits: Traits | None = None,
) -> Route | None:
    """The best pair by `policy`, one of POLICIES; None when there is none.

    `hits`: leading blocks of the prompt that a worker or a store holds. No candidates are draining workers, workers
    whose pool can never hold the prompt, and pairs of different layouts. A decode worker prefills by itself where no
    prefill worker of its layout is eligible; it competes with them where its uncached rest holds its batch up for one
    of its steps at most. Ties go to the least loaded pair, then to the lowest ids. `traits`: of the same workers, from
    one request to the next; with them only those are priced that may be chosen.
    """
    live = live or Live()
    looked = traits.of(prefills, decodes) if traits is not None and policy == "cost" else None
    neutral = looked.neutral() if looked is not None else None
    prices = Pricing.of(request, prefills, decodes, hits, bytes_per_token, live, neutral)
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
    chosen = terms_of(best.source, best.target)
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

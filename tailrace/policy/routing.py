"""Which pair of workers serves a request, by one of four policies over the same prices.

Price of a pair = queue before its prefill + fetching the prefix that others hold + computing the uncached rest + what
the computing costs those who wait + moving the KV that the decode worker lacks + the price of the decode worker's load,
all in seconds and from measured rates. Every candidate's terms are returned, whatever the policy.

`cost` takes the lowest price. The deepest prefix match alone never wins: when most prompts share their first block, it
would send all to one worker. `prefix` does just that, `least-loaded` looks at queues only and `round-robin` at nothing:
they are there to compare with.

Rates nobody has measured yet are taken from the best measured worker or pair, so that a newcomer is tried at all; the
NEUTRAL constants stand in only before the very first measurement, when they are equal for all and only weigh terms.

Per-worker terms are computed once a request; a pair costs a few additions, whatever the length of the prompt.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tailrace.types import Role

NEUTRAL_PREFILL_TOKENS_PER_S = 1000.0
NEUTRAL_DECODE_STEP_S = 0.05
NEUTRAL_PAIR_BYTES_PER_S = 1e9
TURNOVER_STEPS = 128
"""Steps in which a full batch is taken to be replaced by others: the length of an ordinary answer."""
MAX_SOURCES = 4
"""Holders that a fetch is priced from, the deepest first: more would make a decision quadratic in the workers."""
_TIE_DIGITS = 6
"""Totals that agree to the microsecond are a tie."""


@dataclass(frozen=True, slots=True)
class WorkerView:
    """What the router knows of a worker: its last load report, and what this gateway sent it since."""

    worker_id: str
    role: Role
    fingerprint: bytes
    """Of its KVLayout: only equal ones are paired."""
    # From its load report. Rates are 0 before the first measurement; total_blocks is 0 before the first report.
    num_waiting: int = 0
    num_running: int = 0
    waiting_tokens: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    total_blocks: int = 0
    booked_blocks: int = 0
    prefill_tokens_per_s: float = 0.0
    decode_step_s: float = 0.0
    max_num_seqs: int = 1
    draining: bool = False
    # From this gateway: submitted to the worker, and not in its load report yet.
    reserved_tokens: int = 0
    reserved_sequences: int = 0
    # Measured by this gateway.
    prefill_curve_s: float = 0.0
    """Seconds per square token: what attention adds to a prefill beyond its tokens over `prefill_tokens_per_s`."""

    @property
    def num_sequences(self) -> int:
        return self.num_running + self.num_waiting + self.reserved_sequences


@dataclass(frozen=True, slots=True)
class Live:
    """What changes with every request, by worker id; what is not named is 0."""

    backlog_s: Mapping[str, float] = field(default_factory=dict)
    """Prefill seconds before a new request, as predicted when this gateway routed each. The worker may say that it has
    more: other gateways'. Where it is not known, the queue is the waiting and reserved tokens over the rate."""
    waiting: Mapping[str, float] = field(default_factory=dict)
    """Requests expected to wait while the worker computes: each second of prefill is a second for all of them."""
    fetch_bytes_per_s: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """Measured, by (holder, prefill worker): who can fetch a prefix from whom. A holder may be a store's tier."""
    fetchable: Mapping[str, int] = field(default_factory=dict)
    """Leading blocks of the prompt that a holder can lend now."""
    beside: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Holders on the worker's own node, priced for it whoever else holds more."""
    turn: int = 0
    """How many requests were routed before this one."""


@dataclass(frozen=True, slots=True)
class RouteRequest:
    num_prompt_tokens: int
    block_size: int
    num_choices: int = 1
    local_prefill: bool = True
    """Decode workers may prefill."""

    def __post_init__(self) -> None:
        for name in ("num_prompt_tokens", "block_size", "num_choices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def num_prompt_blocks(self) -> int:
        return -(-self.num_prompt_tokens // self.block_size)

    def cached_tokens(self, hit_blocks: int) -> int:
        """The last token is always computed: its logits give the first output token."""
        return min(hit_blocks * self.block_size, self.num_prompt_tokens - 1)

    def uncached_tokens(self, hit_blocks: int) -> int:
        return self.num_prompt_tokens - self.cached_tokens(hit_blocks)


class CostTerms(NamedTuple):
    """One candidate, in predicted seconds. (A tuple, because one is made for every pair of every request.)"""

    decode_id: str
    prefill_id: str | None
    """None: the decode worker prefills."""
    queue_s: float
    prefill_s: float
    transfer_s: float
    decode_load_s: float
    fetch_s: float = 0.0
    """What of the fetch is not hidden by the queue."""
    crowding_s: float = 0.0
    """What the prefill costs those who come after it."""
    hit_blocks: int = 0
    """Leading blocks that the worker who prefills has itself."""
    fetch_blocks: int = 0
    """Blocks after those that it is to fetch from `holder_id`."""
    holder_id: str = ""

    @property
    def total_s(self) -> float:
        return self.queue_s + self.fetch_s + self.prefill_s + self.crowding_s + self.transfer_s + self.decode_load_s


@dataclass(frozen=True, slots=True)
class Route:
    decode_id: str
    prefill_id: str | None
    """None: the decode worker prefills."""
    terms: tuple[CostTerms, ...]
    """Of every candidate, the chosen one included."""
    hashes: tuple[bytes, ...] = ()
    """Of the prompt's full blocks, where the router looked them up."""

    @property
    def chosen(self) -> CostTerms:
        """The terms of the chosen pair."""
        return next(t for t in self.terms if (t.decode_id, t.prefill_id) == (self.decode_id, self.prefill_id))


class _Prefill(NamedTuple):
    """A place to prefill, with what does not depend on the decode worker."""

    view: WorkerView
    queue_s: float
    prefill_s: float
    fetch_s: float
    crowding_s: float
    hit_blocks: int
    fetch_blocks: int
    holder_id: str


class _Decode(NamedTuple):
    """A place to decode, with what does not depend on the prefill worker."""

    view: WorkerView
    load_s: float
    missing_bytes: int


@dataclass(frozen=True, slots=True)
class _Neutral:
    """What stands in for a rate that is not measured."""

    prefill_tokens_per_s: float
    decode_step_s: float
    pair_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class _Pricing:
    """One request's prices."""

    request: RouteRequest
    hits: Mapping[str, int]
    pair_bytes_per_s: Mapping[tuple[str, str], float]
    bytes_per_token: int
    live: Live
    neutral: _Neutral
    holders: Sequence[tuple[str, int]]
    """(Id, depth) of who holds most, the deepest first."""

    def prefill(self, view: WorkerView) -> _Prefill:
        rate = _measured(view.prefill_tokens_per_s, self.neutral.prefill_tokens_per_s)
        worker_id = view.worker_id
        if (backlog_s := self.live.backlog_s.get(worker_id)) is not None:
            queue_s = max(backlog_s, view.waiting_tokens / rate)
        else:
            queue_s = (view.waiting_tokens + view.reserved_tokens) / rate
        own = self.hits.get(worker_id, 0)
        depth, fetch_s, holder_id = own, 0.0, ""
        prefill_s = self._compute_s(view, rate, own)
        for holder, held in self._holders_for(worker_id):
            if held <= own or not (speed := self.live.fetch_bytes_per_s.get((holder, worker_id), 0.0)) > 0.0:
                continue
            num_bytes = (held - own) * self.request.block_size * self.bytes_per_token
            exposed_s = max(0.0, num_bytes / speed - queue_s)
            compute_s = self._compute_s(view, rate, held)
            if exposed_s + compute_s < fetch_s + prefill_s:
                depth, fetch_s, prefill_s, holder_id = held, exposed_s, compute_s, holder
        waiting = self.live.waiting.get(worker_id, 0.0)
        # A rate that is next to nothing makes a prefill infinite, and infinity times 0 would win every comparison.
        crowding_s = prefill_s * waiting if waiting else 0.0
        return _Prefill(view, queue_s, prefill_s, fetch_s, crowding_s, own, depth - own, holder_id)

    def _holders_for(self, worker_id: str) -> Iterator[tuple[str, int]]:
        yield from self.holders
        for holder in self.live.beside.get(worker_id, ()):
            yield holder, self.live.fetchable.get(holder, 0)

    def _compute_s(self, view: WorkerView, rate: float, hit_blocks: int) -> float:
        total = self.request.num_prompt_tokens
        cached = self.request.cached_tokens(hit_blocks)
        return (total - cached) / rate + view.prefill_curve_s * (total * total - cached * cached)

    def decode(self, view: WorkerView) -> _Decode:
        request = self.request
        missing_blocks = max(0, request.num_prompt_blocks - self.hits.get(view.worker_id, 0))
        # Each choice writes a block of its own.
        load_s = _decode_load_s(view, request, missing_blocks + request.num_choices, self.neutral)
        return _Decode(view, load_s, missing_blocks * request.block_size * self.bytes_per_token)

    def pair(self, source: _Prefill, target: _Decode) -> CostTerms:
        decode_id, prefill_id = target.view.worker_id, source.view.worker_id
        rate = _measured(self.pair_bytes_per_s.get((prefill_id, decode_id), 0.0), self.neutral.pair_bytes_per_s)
        return _terms(decode_id, prefill_id, source, target.missing_bytes / rate, target.load_s)


def _terms(decode_id: str, prefill_id: str | None, source: _Prefill, transfer_s: float, load_s: float) -> CostTerms:
    _, queue_s, prefill_s, fetch_s, crowding_s, hit_blocks, fetch_blocks, holder_id = source
    return CostTerms(
        decode_id,
        prefill_id,
        queue_s,
        prefill_s,
        transfer_s,
        load_s,
        fetch_s,
        crowding_s,
        hit_blocks,
        fetch_blocks,
        holder_id,
    )


@dataclass(frozen=True, slots=True)
class _Field:
    """What policies rank candidates by, beside their terms."""

    loads: Mapping[str, int]
    prefill_ids: Sequence[str]
    decode_ids: Sequence[str]
    turn: int

    def load(self, terms: CostTerms) -> int:
        prefill_id = terms.prefill_id
        return self.loads[terms.decode_id] + (self.loads[prefill_id] if prefill_id is not None else 0)


_Rank = Callable[[CostTerms, _Field], tuple[Any, ...]]


def _by_cost(terms: CostTerms, field: _Field) -> tuple[Any, ...]:
    return (round(terms.total_s, _TIE_DIGITS), field.load(terms), terms.prefill_id or "", terms.decode_id)


def _by_load(terms: CostTerms, field: _Field) -> tuple[Any, ...]:
    waiting_s = round(terms.queue_s + terms.decode_load_s, _TIE_DIGITS)
    return (waiting_s, field.load(terms), terms.prefill_id or "", terms.decode_id)


def _by_prefix(terms: CostTerms, field: _Field) -> tuple[Any, ...]:
    return (-terms.hit_blocks, *_by_load(terms, field))


def _by_turn(terms: CostTerms, field: _Field) -> tuple[Any, ...]:
    return (
        _places_on(terms.prefill_id, field.prefill_ids, field),
        _places_on(terms.decode_id, field.decode_ids, field),
    )


def _places_on(worker_id: str | None, ids: Sequence[str], field: _Field) -> int:
    """How far on in the ring of all candidates the worker stands from the one whose turn it is."""
    return (ids.index(worker_id) - field.turn) % len(ids) if worker_id in ids else 0


POLICIES: Mapping[str, _Rank] = {
    "cost": _by_cost,
    "round-robin": _by_turn,
    "least-loaded": _by_load,
    "prefix": _by_prefix,
}


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
) -> Route | None:
    """The best pair by `policy`, one of POLICIES; None when there is none.

    `hits`: leading blocks of the prompt that a worker or a store holds. `pair_bytes_per_s`: measured, by (prefill id,
    decode id). No candidates are draining workers, workers whose pool can never hold the prompt, and pairs of different
    layouts. A decode worker prefills by itself where no prefill worker of its layout is eligible; where its uncached
    rest is at most one block, doing so competes with them. Ties go to the least loaded pair, then to the lowest ids.
    """
    live = live or Live()
    neutral = _neutral_rates(prefills, decodes, pair_bytes_per_s.values())
    holders = _deepest(live.fetchable) if live.fetch_bytes_per_s else ()
    prices = _Pricing(request, hits, pair_bytes_per_s, bytes_per_token, live, neutral, holders)
    sources = [prices.prefill(view) for view in prefills if _is_eligible(view, request, 0)]
    targets = [prices.decode(view) for view in decodes if _is_eligible(view, request, 1)]
    terms: list[CostTerms] = []
    for target in targets:
        fitting = [source for source in sources if source.view.fingerprint == target.view.fingerprint]
        terms += [prices.pair(source, target) for source in fitting]
        decode_id = target.view.worker_id
        is_small = request.uncached_tokens(hits.get(decode_id, 0)) <= request.block_size
        if request.local_prefill and (not fitting or is_small):
            terms.append(_terms(decode_id, None, prices.prefill(target.view), 0.0, target.load_s))
    if not terms:
        return None
    best = _best(terms, prefills, decodes, POLICIES[policy], live.turn)
    return Route(best.decode_id, best.prefill_id, tuple(terms))


def _best(
    terms: Sequence[CostTerms], prefills: Sequence[WorkerView], decodes: Sequence[WorkerView], rank: _Rank, turn: int
) -> CostTerms:
    loads = {view.worker_id: view.num_sequences for view in (*prefills, *decodes)}
    field = _Field(loads, sorted(v.worker_id for v in prefills), sorted(v.worker_id for v in decodes), turn)
    return min(terms, key=lambda candidate: rank(candidate, field))


def _deepest(held: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(held.items(), key=lambda item: (-item[1], item[0]))[:MAX_SOURCES]


def _is_eligible(view: WorkerView, request: RouteRequest, extra_blocks: int) -> bool:
    """`extra_blocks`: beyond the prompt's, without which the worker could not do its part."""
    fits = not view.total_blocks or request.num_prompt_blocks + extra_blocks <= view.total_blocks
    return fits and not view.draining


def _decode_load_s(view: WorkerView, request: RouteRequest, needed_blocks: int, neutral: _Neutral) -> float:
    """What joining this decode worker costs.

    One step to join, up to one more for how full it is (a fuller batch steps slower, for everyone in it), and for what
    does not fit, in sequences or blocks, the share of a whole turnover that must pass before it does.
    """
    step_s = _measured(view.decode_step_s, neutral.decode_step_s)
    filled = (view.num_sequences + request.num_choices) / max(1, view.max_num_seqs)
    excess = max(0.0, filled - 1.0)
    if view.total_blocks:
        taken = needed_blocks + view.booked_blocks + -(-view.reserved_tokens // request.block_size)
        short = taken - (view.free_blocks + view.cached_blocks)
        excess += max(0, short) / view.total_blocks
        filled = max(filled, 1.0 + short / view.total_blocks)
    return step_s * (1.0 + min(filled, 1.0) + excess * TURNOVER_STEPS)


def _neutral_rates(
    prefills: Iterable[WorkerView], decodes: Iterable[WorkerView], pair_rates: Iterable[float]
) -> _Neutral:
    views = [*prefills, *decodes]
    return _Neutral(
        max(filter(_is_rate, (view.prefill_tokens_per_s for view in views)), default=NEUTRAL_PREFILL_TOKENS_PER_S),
        min(filter(_is_rate, (view.decode_step_s for view in views)), default=NEUTRAL_DECODE_STEP_S),
        max(filter(_is_rate, pair_rates), default=NEUTRAL_PAIR_BYTES_PER_S),
    )


def _measured(value: float, neutral: float) -> float:
    return value if _is_rate(value) else neutral


def _is_rate(value: float) -> bool:
    """Reports come from other processes: a negative rate or NaN must not win every comparison."""
    return 0.0 < value < math.inf

"""Which pair of workers serves a request: the one with the lowest predicted time to first token.

Cost of a pair = queue before its prefill + computing the uncached rest + moving the KV that the decode worker lacks
+ the price of the decode worker's load, all in seconds and from measured rates. Every candidate's terms are returned.
The deepest prefix match alone never wins: when most prompts share their first block, it would send all to one worker.

Rates nobody has measured yet are taken from the best measured worker or pair, so that a newcomer is tried at all; the
NEUTRAL constants stand in only before the very first measurement, when they are equal for all and only weigh terms.

Per-worker terms are computed once a request; a pair costs a few additions, whatever the length of the prompt.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tailrace.types import Role

NEUTRAL_PREFILL_TOKENS_PER_S = 1000.0
NEUTRAL_DECODE_STEP_S = 0.05
NEUTRAL_PAIR_BYTES_PER_S = 1e9
TURNOVER_STEPS = 128
"""Steps in which a full batch is taken to be replaced by others: the length of an ordinary answer."""
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

    @property
    def num_sequences(self) -> int:
        return self.num_running + self.num_waiting + self.reserved_sequences


@dataclass(frozen=True, slots=True)
class RouteRequest:
    num_prompt_tokens: int
    block_size: int
    num_choices: int = 1

    def __post_init__(self) -> None:
        for name in ("num_prompt_tokens", "block_size", "num_choices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def num_prompt_blocks(self) -> int:
        return -(-self.num_prompt_tokens // self.block_size)

    def uncached_tokens(self, hit_blocks: int) -> int:
        """The last token is always computed: its logits give the first output token."""
        return max(1, self.num_prompt_tokens - hit_blocks * self.block_size)


class CostTerms(NamedTuple):
    """One candidate, in predicted seconds. (A tuple, because one is made for every pair of every request.)"""

    decode_id: str
    prefill_id: str | None
    """None: the decode worker prefills."""
    queue_s: float
    prefill_s: float
    transfer_s: float
    decode_load_s: float

    @property
    def total_s(self) -> float:
        return self.queue_s + self.prefill_s + self.transfer_s + self.decode_load_s


@dataclass(frozen=True, slots=True)
class Route:
    decode_id: str
    prefill_id: str | None
    """None: the decode worker prefills."""
    terms: tuple[CostTerms, ...]
    """Of every candidate, the chosen one included."""


class _Prefill(NamedTuple):
    """A place to prefill, with what does not depend on the decode worker."""

    view: WorkerView
    queue_s: float
    prefill_s: float


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


def choose(
    request: RouteRequest,
    prefills: Sequence[WorkerView],
    decodes: Sequence[WorkerView],
    hits: Mapping[str, int],
    pair_bytes_per_s: Mapping[tuple[str, str], float],
    bytes_per_token: int,
) -> Route | None:
    """The cheapest pair; None when there is none.

    `hits`: leading blocks of the prompt that a worker holds. `pair_bytes_per_s`: measured, by (prefill id, decode id).
    No candidates are draining workers, workers whose pool can never hold the prompt, and pairs of different layouts.
    A decode worker prefills by itself where no prefill worker of its layout is eligible; where its uncached rest is at
    most one block, doing so competes with them. Ties go to the least loaded pair, then to the lowest ids.
    """
    neutral = _neutral_rates(prefills, decodes, pair_bytes_per_s.values())
    sources = [_price_prefill(view, request, hits, neutral) for view in prefills if _is_eligible(view, request, 0)]
    targets = [
        _price_decode(view, request, hits, neutral, bytes_per_token)
        for view in decodes
        if _is_eligible(view, request, 1)
    ]
    terms: list[CostTerms] = []
    for target in targets:
        fitting = [source for source in sources if source.view.fingerprint == target.view.fingerprint]
        terms += [_price_pair(source, target, pair_bytes_per_s, neutral) for source in fitting]
        local = _price_prefill(target.view, request, hits, neutral)
        if not fitting or request.uncached_tokens(hits.get(target.view.worker_id, 0)) <= request.block_size:
            terms.append(CostTerms(target.view.worker_id, None, local.queue_s, local.prefill_s, 0.0, target.load_s))
    if not terms:
        return None
    loads = {view.worker_id: view.num_sequences for view in (*prefills, *decodes)}
    best = min(terms, key=lambda candidate: _rank(candidate, loads))
    return Route(best.decode_id, best.prefill_id, tuple(terms))


def _rank(candidate: CostTerms, loads: Mapping[str, int]) -> tuple[float, int, str, str]:
    prefill_id = candidate.prefill_id
    load = loads[candidate.decode_id] + (loads[prefill_id] if prefill_id is not None else 0)
    return (round(candidate.total_s, _TIE_DIGITS), load, prefill_id or "", candidate.decode_id)


def _is_eligible(view: WorkerView, request: RouteRequest, extra_blocks: int) -> bool:
    """`extra_blocks`: beyond the prompt's, without which the worker could not do its part."""
    fits = not view.total_blocks or request.num_prompt_blocks + extra_blocks <= view.total_blocks
    return fits and not view.draining


def _price_prefill(view: WorkerView, request: RouteRequest, hits: Mapping[str, int], neutral: _Neutral) -> _Prefill:
    rate = _measured(view.prefill_tokens_per_s, neutral.prefill_tokens_per_s)
    uncached = request.uncached_tokens(hits.get(view.worker_id, 0))
    return _Prefill(view, (view.waiting_tokens + view.reserved_tokens) / rate, uncached / rate)


def _price_decode(
    view: WorkerView, request: RouteRequest, hits: Mapping[str, int], neutral: _Neutral, bytes_per_token: int
) -> _Decode:
    missing_blocks = max(0, request.num_prompt_blocks - hits.get(view.worker_id, 0))
    # Each choice writes a block of its own.
    load_s = _decode_load_s(view, request, missing_blocks + request.num_choices, neutral)
    return _Decode(view, load_s, missing_blocks * request.block_size * bytes_per_token)


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


def _price_pair(
    source: _Prefill, target: _Decode, pair_bytes_per_s: Mapping[tuple[str, str], float], neutral: _Neutral
) -> CostTerms:
    decode_id, prefill_id = target.view.worker_id, source.view.worker_id
    rate = _measured(pair_bytes_per_s.get((prefill_id, decode_id), 0.0), neutral.pair_bytes_per_s)
    transfer_s = target.missing_bytes / rate
    return CostTerms(decode_id, prefill_id, source.queue_s, source.prefill_s, transfer_s, target.load_s)


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

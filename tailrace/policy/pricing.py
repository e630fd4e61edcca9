"""What a request costs at each worker, in seconds and from measured rates.

Price of a pair = queue before its prefill + fetching the prefix that others hold + computing the uncached rest + what
the computing costs those who wait + moving the KV that the decode worker lacks + the price of the decode worker's load.
All but the move is a worker's own, so that prices are computed once a worker and not once a pair.

Rates nobody has measured yet are taken from the best measured worker or pair, so that a newcomer is tried at all; the
NEUTRAL constants stand in only before the very first measurement, when they are equal for all and only weigh terms.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tailrace.kv.events import Tier
from tailrace.policy.pairs import NEUTRAL_PAIR_BYTES_PER_S, PairRates
from tailrace.policy.routing import CostTerms, Held, Live, RouteRequest, WorkerView

NEUTRAL_PREFILL_TOKENS_PER_S = 1000.0
NEUTRAL_DECODE_STEP_S = 0.05
LOCAL_PREFILL_SAFETY = 0.5
"""Of the best measured prefill rate: what a decode worker is taken to reach that has not prefilled yet."""
TURNOVER_STEPS = 128
"""Steps in which a full batch is taken to be replaced by others: the length of an ordinary answer."""
MAX_SOURCES = 4
"""Holders that a fetch is priced from, the deepest first: more would make a decision quadratic in the workers."""
MAX_PRICE_US = 10**18
"""Whatever is dearer costs as much."""
MAX_CURVE_S = 1.0
"""Seconds per square token; what a worker reports beyond is not believed."""


class PrefillPrice(NamedTuple):
    """A place to prefill, with what does not depend on where the request decodes."""

    worker_id: str
    fingerprint: bytes
    num_sequences: int
    price_us: int
    """Of the terms below: whole microseconds, so that prices add up exactly and those that agree to one are a tie."""
    queue_s: float
    prefill_s: float
    fetch_s: float
    crowding_s: float
    hit_blocks: int
    fetch_blocks: int
    holder_id: str
    fetch_disk_blocks: int


class DecodePrice(NamedTuple):
    """A place to decode, with what does not depend on the prefill worker."""

    worker_id: str
    fingerprint: bytes
    num_sequences: int
    load_s: float
    step_s: float
    missing_bytes: int
    transfer_s: float
    """From an owner whose pair with this worker has no rate of its own."""
    bytes_per_s: float
    """The rate behind it."""
    pairs: PairRates

    def transfer_from(self, owner_id: str) -> float:
        """Seconds."""
        rate = self.pairs.others.get(owner_id)
        return self.transfer_s if rate is None else self.missing_bytes / rate

    @property
    def least_transfer_s(self) -> float:
        """From no owner it takes less."""
        return self.missing_bytes / max(self.bytes_per_s, self.pairs.fastest)


class Neutral(NamedTuple):
    """What stands in for a rate that is not measured."""

    prefill_tokens_per_s: float
    decode_step_s: float
    pair_bytes_per_s: float

    @property
    def local_tokens_per_s(self) -> float:
        """Of a decode worker that has not prefilled yet; positive, however low the best rate."""
        return LOCAL_PREFILL_SAFETY * self.prefill_tokens_per_s or self.prefill_tokens_per_s

    @classmethod
    def of(cls, prefill_rate: float, step_s: float, pair_rate: float) -> "Neutral":
        """The best that are measured; 0: nobody's is."""
        return cls(
            prefill_rate or NEUTRAL_PREFILL_TOKENS_PER_S,
            step_s or NEUTRAL_DECODE_STEP_S,
            pair_rate or NEUTRAL_PAIR_BYTES_PER_S,
        )


@dataclass(frozen=True, slots=True)
class Pricing:
    """One request's prices."""

    request: RouteRequest
    hits: Mapping[str, int]
    live: Live
    neutral: Neutral
    holders: Sequence[Held]
    """Who holds most, the deepest first."""
    near: Mapping[str, Held]
    """Those that are on some worker's own node."""
    # Of the request, at hand: they are asked for once a worker.
    prompt_blocks: int
    whole_blocks: int
    """Of the prompt, also those before its window."""
    block_bytes: int
    span: int
    """See Window."""
    # By worker id: who is looked at twice is priced once.
    _prefills: dict[str, PrefillPrice] = field(default_factory=dict)
    _decodes: dict[str, DecodePrice] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        request: RouteRequest,
        prefills: Sequence[WorkerView],
        decodes: Sequence[WorkerView],
        hits: Mapping[str, int],
        bytes_per_token: int,
        live: Live,
        neutral: Neutral | None = None,
    ) -> "Pricing":
        """`neutral`: where it is known already, what `neutral_rates` gives."""
        neutral = neutral or neutral_rates(prefills, decodes)
        holders = deepest(live.held) if live.ways is not None else ()
        near = {held.holder_id: held for held in live.held} if live.beside and holders else {}
        block_bytes = request.block_size * bytes_per_token
        blocks, whole = request.num_prompt_blocks, request.whole_blocks
        span = request.span
        return cls(request, hits, live, neutral, holders, near, blocks, whole, block_bytes, span)

    # -- where it is prefilled ----------------------------------------------------------------------------------------

    def prefill(self, view: WorkerView) -> PrefillPrice:
        price = self._prefills.get(view.worker_id)
        if price is None:
            price = self._prefills[view.worker_id] = self._price_prefill(view)
        return price

    def _price_prefill(self, view: WorkerView) -> PrefillPrice:
        rate = view.prefill_tokens_per_s
        if not 0.0 < rate < math.inf:
            rate = self.neutral.prefill_tokens_per_s
        worker_id = view.worker_id
        queue_s = self._queue_s(view, rate)
        own = self.hits.get(worker_id, 0)
        way = self._cheapest_way(view, rate, own, hidden_s=queue_s)
        return _priced(view, view.num_sequences, queue_s, way, own, self.live.waiting.get(worker_id, 0.0))

    def is_named(self, view: WorkerView) -> bool:
        """The hashes of the prompt name blocks of this worker's layout."""
        return view.fingerprint == self.request.fingerprint or not self.request.fingerprint

    def local(self, view: WorkerView, longest_s: float) -> PrefillPrice | None:
        """On the decode worker itself, whose running batch waits for every chunk, and for none of what is fetched.

        None where computing would take more than `longest_s`, and more than one block. A queue hides nothing of the
        fetch, which begins at the head of the worker's line.
        """
        rate = measured(view.prefill_tokens_per_s, self.neutral.local_tokens_per_s)
        worker_id = view.worker_id
        own = self.hits.get(worker_id, 0)
        may_fetch = bool(self.holders) and self.is_named(view)
        deepest_held = max(own, self.holders[0].depth) if may_fetch else own
        if self._is_too_much(self._compute_s(view, rate, deepest_held), deepest_held, longest_s):
            return None
        way = self._cheapest_way(view, rate, own, hidden_s=0.0)
        if self._is_too_much(way.prefill_s, way.depth, longest_s):
            return None
        return _priced(view, 0, self._queue_s(view, rate), way, own, view.num_sequences)

    def _cheapest_way(self, view: WorkerView, rate: float, own: int, *, hidden_s: float) -> "_Way":
        """From whom it fetches what it lacks of the prefix, if from anybody. `hidden_s`: of a fetch, by its queue."""
        best = _Way(own, own, 0.0, self._compute_s(view, rate, own), None)
        for held in self.sources_for(view.worker_id) if self.holders and self.is_named(view) else ():
            if held.depth <= own or held.holder_id == view.worker_id:
                continue
            exposed_s = self.fetch_s(held, view.worker_id, own) - hidden_s
            if exposed_s < 0.0:
                exposed_s = 0.0
            compute_s = self._compute_s(view, rate, held.depth)
            if exposed_s + compute_s < best.fetch_s + best.prefill_s:
                best = _Way(held.depth, self.first_fetched(own, held.depth), exposed_s, compute_s, held)
        return best

    def _is_too_much(self, prefill_s: float, depth: int, longest_s: float) -> bool:
        return prefill_s > longest_s and self.request.uncached_tokens(depth) > self.request.block_size

    def _queue_s(self, view: WorkerView, rate: float) -> float:
        backlogs = self.live.backlog_s
        if backlogs is None:
            return (view.waiting_tokens + view.reserved_tokens) / rate
        known_s = backlogs.get(view.worker_id, 0.0)
        others = view.waiting_tokens - self.live.backlog_tokens.get(view.worker_id, 0.0)
        return known_s + others / rate if others > 0.0 else known_s

    def _compute_s(self, view: WorkerView, rate: float, hit_blocks: int) -> float:
        request = self.request
        total = request.num_prompt_tokens
        cached = hit_blocks * request.block_size
        # The last token is always computed.
        if cached >= total:
            cached = total - 1
        curve_s = view.prefill_curve_s
        if not 0.0 < curve_s < MAX_CURVE_S:
            curve_s = 0.0
        return (total - cached) / rate + curve_s * (total * total - cached * cached)

    # -- what is fetched ----------------------------------------------------------------------------------------------

    def first_fetched(self, own: int, end: int) -> int:
        """Of leading blocks that reach to `end`, where `own` are there: with a window not all others are needed."""
        return max(own, end - self.span) if self.span else own

    def sources_for(self, worker_id: str) -> Iterable[Held]:
        beside = self.live.beside.get(worker_id)
        if not beside:
            return self.holders
        return [*self.holders, *(self.near[holder] for holder in beside if holder in self.near)]

    def fetch_s(self, held: Held, needer_id: str, first_block: int, end_block: int | None = None) -> float:
        """Of what is needed of blocks `first_block` to `end_block` - 1, by default of all that are held; infinite where
        there is no way."""
        ways = self.live.ways
        if ways is None:
            return math.inf
        holder_id, depth, is_store, on_disk = held
        end = depth if end_block is None else end_block
        if self.span:
            first_block = self.first_fetched(first_block, end)
        num_blocks = end - first_block
        if on_disk:
            on_disk = held.on_disk_of(first_block, first_block + num_blocks)
        seconds = 0.0
        if num_blocks > on_disk:
            way = ways.way(holder_id, needer_id, Tier.CPU if is_store else Tier.WORKER)
            if way is None:
                return math.inf
            seconds = way.overhead_s + (num_blocks - on_disk) * self.block_bytes * way.s_per_byte
        if on_disk:
            way = ways.way(holder_id, needer_id, Tier.NVME)
            if way is None:
                return math.inf
            seconds += way.overhead_s + on_disk * self.block_bytes * way.s_per_byte
        return seconds

    # -- where it decodes ---------------------------------------------------------------------------------------------

    def decode(self, view: WorkerView) -> DecodePrice:
        price = self._decodes.get(view.worker_id)
        if price is None:
            price = self._decodes[view.worker_id] = self._price_decode(view)
        return price

    def _price_decode(self, view: WorkerView) -> DecodePrice:
        num_choices, neutral = self.request.num_choices, self.neutral
        num_sequences = view.num_sequences
        missing_blocks = self.missing_blocks(view.worker_id)
        missing_bytes = missing_blocks * self.block_bytes
        batch = num_sequences + num_choices
        step_s = step_seconds(view, batch, neutral)
        # Each choice writes a block of its own.
        load_s = step_s * decode_steps(view, batch, missing_blocks + num_choices, self.request.block_size)
        rate = view.transfer_bytes_per_s
        if not 0.0 < rate < math.inf:
            rate = neutral.pair_bytes_per_s
        return DecodePrice(
            view.worker_id,
            view.fingerprint,
            num_sequences,
            load_s,
            step_s,
            missing_bytes,
            missing_bytes / rate,
            rate,
            view.pairs,
        )

    def missing_blocks(self, worker_id: str) -> int:
        """Of those that are handed over, which are the prompt's last ones."""
        missing = self.whole_blocks - self.hits.get(worker_id, 0)
        if missing > self.prompt_blocks:
            return self.prompt_blocks
        return missing if missing > 0 else 0


class _Way(NamedTuple):
    """How the prompt comes to be computed at one worker."""

    depth: int
    """Leading blocks that are there before anything is computed."""
    first_fetched: int
    fetch_s: float
    """What shows of the fetch."""
    prefill_s: float
    source: Held | None


def _priced(
    view: WorkerView, num_sequences: int, queue_s: float, way: _Way, own: int, num_waiting: float
) -> PrefillPrice:
    """`own`: blocks that it holds; `num_waiting`: those who wait while it computes."""
    depth, first, fetch_s, prefill_s, source = way
    # A rate that is next to nothing makes a prefill infinite, and infinity times 0 would win every comparison.
    crowding_s = prefill_s * num_waiting if num_waiting else 0.0
    return PrefillPrice(
        view.worker_id,
        view.fingerprint,
        num_sequences,
        microseconds(queue_s + fetch_s + prefill_s + crowding_s),
        queue_s,
        prefill_s,
        fetch_s,
        crowding_s,
        own,
        depth - first,
        source.holder_id if source is not None else "",
        source.on_disk_of(first, depth) if source is not None else 0,
    )


def terms_of(source: PrefillPrice, target: DecodePrice) -> CostTerms:
    is_local = source.worker_id == target.worker_id
    return CostTerms(
        target.worker_id,
        None if is_local else source.worker_id,
        source.queue_s,
        source.prefill_s,
        0.0 if is_local else target.transfer_from(source.worker_id),
        target.load_s,
        source.fetch_s,
        source.crowding_s,
        source.hit_blocks,
        source.fetch_blocks,
        source.holder_id,
        source.fetch_disk_blocks,
        0.0 if is_local else target.pairs.others.get(source.worker_id, target.bytes_per_s),
    )


def microseconds(seconds: float) -> int:
    return round(seconds * 1e6) if seconds * 1e6 < MAX_PRICE_US else MAX_PRICE_US


def deepest(held: Sequence[Held]) -> list[Held]:
    """At most MAX_SOURCES, the deepest first, and among them the deepest worker and the deepest store."""
    ordered = sorted(held, key=lambda one: (-one.depth, one.holder_id))
    chosen = ordered[:MAX_SOURCES]
    for is_store in (False, True):
        if all(one.is_store is not is_store for one in chosen):
            chosen += [one for one in ordered if one.is_store is is_store][:1]
    return chosen


def is_eligible(view: WorkerView, num_blocks: int) -> bool:
    """`num_blocks`: without which the worker could not do its part."""
    return not view.draining and (not view.total_blocks or num_blocks <= view.total_blocks)


def step_seconds(view: WorkerView, batch: int, neutral: Neutral) -> float:
    """Of a batch of so many sequences, as far as it is measured by batch."""
    base_s, row_s = view.decode_base_s, view.decode_row_s
    if base_s > 0.0 or row_s > 0.0:
        most = view.max_num_seqs if view.max_num_seqs > 1 else 1
        step_s = (base_s if base_s > 0.0 else 0.0) + (row_s if row_s > 0.0 else 0.0) * (batch if batch < most else most)
        if step_s < math.inf:
            return step_s
    return measured(view.decode_step_s, neutral.decode_step_s)


def decode_steps(view: WorkerView, batch: int, needed_blocks: int, block_size: int) -> float:
    """What joining this decode worker, with `batch` sequences then, costs in its steps.

    One step to join, up to one more for how full it is (a fuller batch steps slower, for everyone in it), and for what
    does not fit, in sequences or blocks, the share of a whole turnover that must pass before it does.
    """
    filled = batch / view.max_num_seqs if view.max_num_seqs > 1 else float(batch)
    excess = filled - 1.0 if filled > 1.0 else 0.0
    if view.total_blocks:
        taken = needed_blocks + view.booked_blocks + -(-view.reserved_tokens // block_size)
        short = taken - (view.free_blocks + view.cached_blocks)
        if short > 0:
            excess += short / view.total_blocks
        by_blocks = 1.0 + short / view.total_blocks
        filled = by_blocks if by_blocks > filled else filled
    return 1.0 + (filled if filled < 1.0 else 1.0) + excess * TURNOVER_STEPS


def neutral_rates(prefills: Sequence[WorkerView], decodes: Sequence[WorkerView]) -> Neutral:
    prefill_rate = step_s = pair_rate = 0.0
    for view in (*prefills, *decodes):
        if prefill_rate < view.prefill_tokens_per_s < math.inf:
            prefill_rate = view.prefill_tokens_per_s
        if 0.0 < view.decode_step_s < (step_s or math.inf):
            step_s = view.decode_step_s
        if pair_rate < view.transfer_bytes_per_s < math.inf:
            pair_rate = view.transfer_bytes_per_s
    return Neutral.of(prefill_rate, step_s, pair_rate)


def measured(value: float, neutral: float) -> float:
    """Reports come from other processes: a negative rate or NaN must not win every comparison."""
    return value if 0.0 < value < math.inf else neutral

"""What routing speaks of: workers as a router sees them, a request, the terms of a candidate, a route.

`pricing` puts prices on workers, `choosing` takes a pair by one of its policies, `router` keeps the state behind both.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from tailrace.kv.events import Tier
from tailrace.kv.window import Window
from tailrace.policy.pairs import NO_PAIRS, PairRates
from tailrace.types import Role


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
    # Fitted: 0 while they cannot be told from noise.
    prefill_curve_s: float = 0.0
    """Seconds per square token: what attention adds to a prefill beyond its tokens over `prefill_tokens_per_s`."""
    decode_base_s: float = 0.0
    """Of a decode step of an empty batch; 0: not fitted, and `decode_step_s` stands for any batch."""
    decode_row_s: float = 0.0
    """What each sequence adds to a step."""
    transfer_bytes_per_s: float = 0.0
    """At which a decode worker pulls from an owner whose pair with it has no rate of its own."""
    pairs: PairRates = NO_PAIRS
    """At which it pulls from single owners."""

    @property
    def num_sequences(self) -> int:
        return self.num_running + self.num_waiting + self.reserved_sequences


class Way(NamedTuple):
    """What a fetch takes: seconds = overhead_s + bytes x s_per_byte."""

    overhead_s: float
    s_per_byte: float


class FetchWays(Protocol):
    """Who can fetch cached blocks from whom, and how fast."""

    def way(self, holder_id: str, needer_id: str, tier: Tier) -> Way | None:
        """From that tier of the holder; None: not now."""
        ...


class Held(NamedTuple):
    """Leading blocks of a prompt that somebody can lend now; with a window, as far as they are needed at their end."""

    holder_id: str
    depth: int
    is_store: bool = False
    on_disk: int = 0
    """How many of a store's are on its disk: the last ones, as it keeps a chain's beginning in memory longest."""

    def on_disk_of(self, first_block: int, end_block: int) -> int:
        """Of blocks `first_block` to `end_block` - 1."""
        return max(0, end_block - max(first_block, self.depth - self.on_disk))


class PrefixRange(NamedTuple):
    """Blocks of a prompt that are to be fetched from one holder."""

    holder_id: str
    first_block: int
    num_blocks: int
    is_store: bool = False
    on_disk: int = 0
    """How many of them are on the store's disk."""


@dataclass(frozen=True, slots=True)
class Live:
    """What changes with every request, by worker id; what is not named is 0."""

    backlog_s: Mapping[str, float] | None = None
    """Prefill seconds before a new request, as predicted when this gateway routed each. None: not known, and the queue
    is the waiting and reserved tokens over the rate."""
    backlog_tokens: Mapping[str, float] = field(default_factory=dict)
    """Of the same requests' prompts, cached or not: what a worker says is waiting beyond them is other gateways'."""
    waiting: Mapping[str, float] = field(default_factory=dict)
    """Requests expected to wait while the worker computes: each second of prefill is a second for all of them."""
    ways: FetchWays | None = None
    """None: nothing is fetched."""
    held: Sequence[Held] = ()
    beside: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Holders on the worker's own node, priced for it whoever else holds more."""
    turn: int = 0
    """How many requests were routed before this one."""
    preferred: "Preferred | None" = None


@dataclass(frozen=True, slots=True)
class Preferred:
    """The pair that served the last request of the same session."""

    prefill_id: str
    """Empty: the decode worker prefilled."""
    decode_id: str


@dataclass(frozen=True, slots=True)
class RouteRequest:
    num_prompt_tokens: int
    block_size: int
    num_choices: int = 1
    fingerprint: bytes = b""
    """Of the layout that the prompt's hashes are of: workers of another one neither fetch by them nor will have them.
    Empty: all workers are of one layout."""
    local_prefill: bool = True
    """Decode workers may prefill."""
    window: int = 0
    """KVLayout.window."""

    def __post_init__(self) -> None:
        for name in ("num_prompt_tokens", "block_size", "num_choices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def num_prompt_blocks(self) -> int:
        """Those that a worker needs at once, and that are handed over: with a window not all of them."""
        first = Window(self.window, self.block_size).first_handed_over(self.num_prompt_tokens)
        return self.whole_blocks - first

    @property
    def span(self) -> int:
        """See Window."""
        return Window(self.window, self.block_size).span if self.window else 0

    @property
    def whole_blocks(self) -> int:
        """Of the prompt, also those before its window."""
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
    """Blocks after those that it is to fetch from `holder_id`; with a window, not all of them."""
    holder_id: str = ""
    fetch_disk_blocks: int = 0
    """Of the blocks to fetch, those on a store's disk."""
    transfer_bytes_per_s: float = 0.0
    """The rate behind `transfer_s`, of this pair where it is measured; 0: the decode worker prefills."""

    @property
    def total_s(self) -> float:
        return self.queue_s + self.fetch_s + self.prefill_s + self.crowding_s + self.transfer_s + self.decode_load_s


@dataclass(frozen=True, slots=True)
class Route:
    chosen: CostTerms
    """The terms of the chosen pair."""
    explain: Callable[[], tuple[CostTerms, ...]] = field(compare=False)
    """Makes the terms of every candidate: a cluster has thousands, and seldom does anybody ask."""
    hashes: tuple[bytes, ...] = ()
    """Of the prompt's full blocks, where the router looked them up."""
    sources: tuple[PrefixRange, ...] = ()
    """Whom the worker that prefills is to ask for cached blocks, in order, each for its own."""
    known_blocks: int = 0
    """Leading blocks that anybody was known to hold."""
    num_prompt_tokens: int = 0
    is_measured: bool = True
    """Its seconds come from a rate that some worker has measured."""

    @property
    def decode_id(self) -> str:
        return self.chosen.decode_id

    @property
    def prefill_id(self) -> str | None:
        """None: the decode worker prefills."""
        return self.chosen.prefill_id

    @property
    def terms(self) -> tuple[CostTerms, ...]:
        """Of every candidate, the chosen one included."""
        return self.explain()

"""What gateway and workers say to each other, as plain values.

`tailrace.rpc.convert` puts them on the wire and takes them off.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from tailrace.errors import TailraceError
from tailrace.kv.events import KVEvents
from tailrace.kv.layout import KVLayout
from tailrace.types import FinishReason, Role, SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """Who a worker is; fixed for its life."""

    worker_id: str
    epoch: int
    role: Role
    layout: KVLayout
    model: str
    max_model_len: int
    max_num_seqs: int
    num_blocks: int
    address: str
    """host:port of its gRPC server, as its peers reach it."""
    version: str


@dataclass(frozen=True, slots=True)
class OwnerRate:
    """At which a worker reads from one owner of blocks, whatever it reads."""

    owner_id: str
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class LinkCount:
    """Owners that a worker reads over one transport, `num` of them."""

    transport: str
    why_not_nixl: str
    """A word of docs/metrics.md; empty for nixl."""
    num: int


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a worker is. Rates are measured, exponentially weighted, 0 before the first measurement."""

    num_waiting: int = 0
    num_running: int = 0
    waiting_tokens: int = 0
    total_blocks: int = 0
    free_blocks: int = 0
    active_blocks: int = 0
    cached_blocks: int = 0
    lent_blocks: int = 0
    landing_blocks: int = 0
    quarantined_blocks: int = 0
    booked_blocks: int = 0
    prefill_tokens_per_s: float = 0.0
    decode_step_s: float = 0.0
    transfer_bytes_per_s: float = 0.0
    draining: bool = False
    prefill_curve_s: float = 0.0
    """Seconds per square token: a prefill of tokens c to n takes (n - c) / prefill_tokens_per_s + curve (n^2 - c^2)."""
    decode_base_s: float = 0.0
    """A decode step of n sequences takes base + n x row seconds."""
    decode_row_s: float = 0.0
    owners: tuple[OwnerRate, ...] | None = None
    """Of all whose rate is measured; None: as this worker said before."""
    links: tuple[LinkCount, ...] = ()


@dataclass(frozen=True, slots=True)
class KvSource:
    """Where a decode worker finds a prompt's blocks."""

    worker_id: str
    epoch: int
    address: str
    ticket: bytes


@dataclass(frozen=True, slots=True)
class PrefixSource:
    """Who is thought to hold blocks `first_block` to `first_block + num_blocks - 1` of a prompt's chain, cached."""

    source: KvSource
    """Without a ticket: cached blocks are named by their hashes."""
    first_block: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Submission:
    """One leg of one attempt of a request. `handle` is its short name on the stream that carries it."""

    handle: int
    request_id: str
    attempt: int
    tokens: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    choices: tuple[int, ...]
    priority: int
    deadline_s: float
    ticket: bytes = b""
    cache_salt: str = ""
    source: KvSource | None = None
    prefix_sources: tuple[PrefixSource, ...] = ()
    """For whoever computes the prompt. Hints: what is not there, late or refused is computed."""
    traceparent: str = ""
    tracestate: str = ""


@dataclass(slots=True)
class TokenColumns:
    """Drawn tokens, column by column; `logprobs` is None when nobody asked."""

    handles: list[int] = field(default_factory=list)
    choices: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob | None] | None = None

    def add(self, handle: int, choice: int, position: int, token_id: int, logprob: TokenLogprob | None) -> None:
        if logprob is not None and self.logprobs is None:
            self.logprobs = [None] * len(self.handles)
        if self.logprobs is not None:
            self.logprobs.append(logprob)
        self.handles.append(handle)
        self.choices.append(choice)
        self.positions.append(position)
        self.token_ids.append(token_id)

    def extend(self, other: "TokenColumns") -> None:
        if self.logprobs is not None or other.logprobs is not None:
            self.logprobs = [
                *(self.logprobs or [None] * len(self.handles)),
                *(other.logprobs or [None] * len(other.handles)),
            ]
        self.handles += other.handles
        self.choices += other.choices
        self.positions += other.positions
        self.token_ids += other.token_ids


@dataclass(frozen=True, slots=True)
class ChoiceFinished:
    handle: int
    choice: int
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class LegFailed:
    handle: int
    error: TailraceError


@dataclass(frozen=True, slots=True)
class Fetch:
    """Cached blocks that were pulled from one holder: how many were asked for, and how many landed well."""

    holder_id: str
    num_asked: int
    num_blocks: int
    num_bytes: int
    seconds: float
    """From asking until the last block had landed, or nothing more was to come; without a first meeting."""


@dataclass(frozen=True, slots=True)
class LegReport:
    """Where a leg's time went, in seconds; sent once."""

    handle: int
    queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    """Pulling the prompt from its prefill worker; of a prefill leg, waiting for the prefix that it fetched."""
    transfer_bytes: int = 0
    transport: str = ""
    decode_s: float = 0.0
    join_s: float = 0.0
    cached_tokens: int = 0
    cached_by_tier: dict[str, int] = field(default_factory=dict)
    """Tokens by where they were found: "worker" (the memory of whoever computed the prompt), "peer" (another worker's),
    "cpu" and "nvme" (a store's). They add up to `cached_tokens`."""
    fetches: tuple[Fetch, ...] = ()


@dataclass(frozen=True, slots=True)
class KvEventBatch:
    """Changes of what a worker has cached. A gap before `first_sequence` means that a snapshot is needed."""

    epoch: int
    first_sequence: int
    events: KVEvents


@dataclass(slots=True)
class StepEvents:
    """What one engine step had to say to one gateway, or a beat."""

    epoch: int = 0
    step: int = 0
    info: WorkerInfo | None = None
    load: Load | None = None
    tokens: TokenColumns = field(default_factory=TokenColumns)
    finished: list[ChoiceFinished] = field(default_factory=list)
    failed: list[LegFailed] = field(default_factory=list)
    reports: list[LegReport] = field(default_factory=list)
    kv_events: KvEventBatch | None = None


@dataclass(frozen=True, slots=True)
class LentBlocks:
    """Completely written blocks; the lists run side by side, from entry `first_index` of the request's table on."""

    first_index: int
    blocks: list[int]
    addresses: list[int]
    generations: list[int]
    tiers: bytes = b""
    """The Tier that each was found on, a byte each; empty: all in the memory that the owner computes in."""


@dataclass(frozen=True, slots=True)
class FirstToken:
    choice: int
    token_id: int
    logprob: TokenLogprob | None
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class LendDone:
    """All blocks of the prompt have been reported ready."""

    first_tokens: tuple[FirstToken, ...]
    last_block_tokens: int
    cached_tokens: int
    queue_s: float
    prefill_s: float


@dataclass(frozen=True, slots=True)
class LendTerms:
    """What a needer asks an owner to lend: blocks by their hashes, or those of the request that `ticket` names."""

    request_id: str
    attempt: int
    ticket: bytes
    needer_id: str
    needer_epoch: int
    transport: str
    skip_blocks: int = 0
    block_hashes: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class BlockOffer:
    """A chain of cached blocks that a worker would lend to a store: from its first on; with a window, a part of it."""

    source: KvSource
    layout: KVLayout
    block_hashes: tuple[bytes, ...]
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class TierUsage:
    """Blocks of one tier of a store, by state; they add up to the total."""

    total: int = 0
    free: int = 0
    cached: int = 0
    lent: int = 0
    landing: int = 0
    quarantined: int = 0


@dataclass(frozen=True, slots=True)
class TenantUsage:
    """Blocks of one tenant in a store, and its quotas in blocks; None: none."""

    tenant: str
    memory_blocks: int
    disk_blocks: int
    memory_quota: int | None = None
    disk_quota: int | None = None


@dataclass(frozen=True, slots=True)
class StoreUsage:
    layout: KVLayout
    memory: TierUsage
    disk: TierUsage | None
    """None: no disk tier."""
    tenants: tuple[TenantUsage, ...]
    pinned: dict[str, int]
    """Blocks by owner."""
    pin_limit: int
    """Different blocks that may be pinned at a time."""
    disk_trouble: str = ""


class HoldingState(StrEnum):
    ACTIVE = "active"
    LENT = "lent"
    LANDING = "landing"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True)
class Holding:
    """Who holds which blocks, and why."""

    holder: str
    state: HoldingState
    blocks: tuple[int, ...]
    age_s: float


@dataclass(frozen=True, slots=True)
class LedgerReport:
    """free + active + cached + lent + landing + quarantined == total."""

    worker_id: str
    epoch: int
    total: int
    free: int
    active: int
    cached: int
    lent: int
    landing: int
    quarantined: int
    holdings: tuple[Holding, ...] = ()

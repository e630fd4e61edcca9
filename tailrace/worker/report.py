"""What the engine's thread hands to the event loop after a step. Ids are the worker's own request ids."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tailrace.kv.block_pool import Ledger
from tailrace.kv.events import KVEvent
from tailrace.messages import ChoiceFinished, LegFailed, LegReport, LendDone, LentBlocks, Load, TokenColumns
from tailrace.policy.offers import CachedChain


@dataclass(frozen=True, slots=True)
class LendProgress:
    """Blocks of a request that are completely written; `done` when there are no more to come."""

    request_id: int
    ready: LentBlocks
    done: LendDone | None = None


@dataclass(frozen=True, slots=True)
class Destination:
    """A booked request got its block table; entries from `num_local` on are to be pulled."""

    request_id: int
    blocks: tuple[int, ...]
    num_local: int


@dataclass(frozen=True, slots=True)
class PrefixDestination:
    """A request that waits for its prefix got blocks for it; `patience_s` is how long it may wait."""

    request_id: int
    hashes: Sequence[bytes]
    """Of its chain, from the root on."""
    blocks: tuple[int, ...]
    """Entries from `num_local` on are to be read into."""
    num_local: int
    patience_s: float
    prompt_of: int | None = None
    """Where a fetch has an id of its own: the request whose submission names who holds its prefix. None: `request_id`
    is a request's, or, on a decode worker, the fetch is for blocks that were lost there."""


@dataclass(slots=True)
class StepReport:
    computed: bool = False
    """The engine ran: another step may follow at once."""
    load: Load = field(default_factory=Load)
    tokens: TokenColumns = field(default_factory=TokenColumns)
    finished: list[ChoiceFinished] = field(default_factory=list)
    failed: list[LegFailed] = field(default_factory=list)
    reports: list[LegReport] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    """Requests that this worker has forgotten."""
    kv_events: list[KVEvent] = field(default_factory=list)
    lends: list[LendProgress] = field(default_factory=list)
    chains: list[CachedChain] = field(default_factory=list)
    """A store may want them."""
    granted: list[Destination] = field(default_factory=list)
    fetching: list[PrefixDestination] = field(default_factory=list)


def with_ledger(load: Load, ledger: Ledger) -> Load:
    return replace(
        load,
        total_blocks=ledger.total,
        free_blocks=ledger.free,
        active_blocks=ledger.active,
        cached_blocks=ledger.cached,
        lent_blocks=ledger.lent,
        landing_blocks=ledger.landing,
        quarantined_blocks=ledger.quarantined,
    )

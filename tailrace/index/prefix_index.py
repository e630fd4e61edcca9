"""What every prefix index does: changes of what workers hold go in, leading blocks of a prompt come out."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from tailrace.kv.events import KVEvent, Tier

FIRST_SEQUENCE = 0
"""Number of an epoch's first event."""


class PrefixHit(NamedTuple):
    """Leading blocks that one worker holds. (A tuple, because one is made for every holder of every prompt.)"""

    num_blocks: int
    by_tier: tuple[int, ...]
    """How many of them lie on each tier, by Tier; of a run, how many of its own."""


@dataclass(frozen=True, slots=True)
class IndexStats:
    num_entries: int
    """Different blocks."""
    num_held: int
    """Blocks of all workers, a shared one once for each."""
    num_dead: int
    """Blocks of dropped workers that have not been swept away."""
    num_refused: int
    """Publications beyond a limit, since the start."""
    num_moved: int
    """Entries that growing and sweeping have copied, since the start."""
    num_bytes: int
    """0: not known."""
    num_lookups: int = 0
    """Since the start."""


def deepest_runs(holders: Sequence[Mapping[str, Tier]], span: int) -> dict[str, PrefixHit]:
    """As PrefixIndex.deepest_runs, from who holds each block."""
    hits: dict[str, PrefixHit] = {}
    runs: dict[str, list[Tier]] = {}
    for place, here in enumerate(holders):
        runs = {worker_id: [*runs.get(worker_id, []), tier][-span:] for worker_id, tier in here.items()}
        for worker_id, tiers in runs.items():
            if len(tiers) == min(span, place + 1):
                hits[worker_id] = PrefixHit(place + 1, tuple(tiers.count(tier) for tier in Tier))
    return hits


class PrefixIndex(Protocol):
    """Entries are hints: what is missing costs a hit, what is stale is refused by the owner.

    What a worker holds of a chain begins at its first block and has no holes, as it drops a chain's end first. Where
    hints have a hole all the same, a hit may end at it, or at a later end of what is held.

    Epochs of a worker go up: a higher one replaces everything known of the worker, a lower one is ignored. A worker
    holds a block on one tier; published again, it has moved. Memory is bounded, so that blocks beyond a limit may be
    missing.
    """

    def num_blocks(self, worker_id: str) -> int: ...

    def stats(self) -> IndexStats: ...

    def longest_prefix(self, hashes: Sequence[bytes]) -> dict[str, int]:
        """Leading blocks of `hashes` that each worker holds; workers that hold none are not named."""
        ...

    def longest_prefix_by_tier(self, hashes: Sequence[bytes]) -> dict[str, PrefixHit]:
        """As `longest_prefix`, and how many of the blocks lie on which tier. A hit ends at the first hole."""
        ...

    def deepest_runs(self, hashes: Sequence[bytes], span: int) -> dict[str, PrefixHit]:
        """The deepest place before which each worker holds `span` blocks in a row, or all: where a model whose layers
        see no further can go on. At least the last `min(span, num_blocks)` of a hit are there, with their tiers.
        """
        ...

    def apply(self, worker_id: str, epoch: int, first_sequence: int, events: Sequence[KVEvent]) -> bool:
        """Applies events numbered from `first_sequence`; those already applied are skipped, an old epoch is ignored.

        False, and nothing changed, when events are missing before these: fetch a snapshot and call `reset`.
        """
        ...

    def reset(
        self, worker_id: str, epoch: int, hashes: Iterable[bytes], next_sequence: int, *, max_blocks: int | None = None
    ) -> None:
        """Replaces all that is known of a worker by a snapshot, after which its event `next_sequence` comes next.

        `max_blocks`: what the worker can hold at most, where known; it can only lower the index's own limit.
        """
        ...

    def publish(self, worker_id: str, epoch: int, hashes: Iterable[bytes], tier: Tier = Tier.WORKER) -> None:
        """The worker holds these blocks, outside any numbering; an old epoch is ignored."""
        ...

    def retract(self, worker_id: str, epoch: int, hashes: Iterable[bytes]) -> None:
        """The worker no longer holds these blocks; an old epoch is ignored."""
        ...

    def drop_worker(self, worker_id: str) -> None:
        """Forgets a worker; one that is not known is no error."""
        ...

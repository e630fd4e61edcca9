"""What a store has done since it began, for metrics and benchmarks."""

from dataclasses import dataclass


@dataclass(slots=True)
class StoreCounters:
    """Blocks, unless it says otherwise."""

    hits_memory: int = 0
    """Asked for by a needer, and in memory."""
    hits_disk: int = 0
    misses: int = 0
    """Asked for, and not there, or behind one that was not there."""
    offered: int = 0
    taken: int = 0
    """Pulled from a worker."""
    failed_pulls: int = 0
    evicted_memory: int = 0
    evicted_disk: int = 0
    written: int = 0
    unwritten: int = 0
    """Given up before they were written to disk: it is slower than what comes."""
    read: int = 0
    dropped_corrupt: int = 0
    """Found on disk with other bytes than were written."""
    restored: int = 0
    """Found on disk at the start."""
    restored_bad: int = 0
    """Entries found on disk at the start that nobody can believe."""

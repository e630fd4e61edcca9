"""What goes in and out of a KvStore."""

from dataclasses import dataclass

from tailrace.kvstore.slots import StoredBlock, TierLedger


@dataclass(frozen=True, slots=True)
class StoreLedger:
    """Slots of each tier, none on the disk where there is no disk tier; `unwritten`: blocks in line to be written."""

    memory: TierLedger
    disk: TierLedger
    unwritten: int


@dataclass(frozen=True, slots=True)
class OfferedBlock:
    block_hash: bytes
    depth: int
    """Blocks before it in what was offered."""
    moment: int
    """Of the offer: one for the whole chain, in however many reads it comes (see Usage)."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A memory slot that a peer's block is being read into."""

    block: StoredBlock
    slot: int

"""What a worker tells the prefix index about its cached blocks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import overload

from tailrace.kv.hashing import HASH_BYTES

_TIER_SHIFT = 4
_KIND_MASK = (1 << _TIER_SHIFT) - 1


class Tier(IntEnum):
    """Where a holder keeps a block, nearest to computation first. Numbers are those on the wire."""

    WORKER = 0
    """The memory that a worker computes in: a GPU's, or the host's on a CPU worker."""
    CPU = 1
    """Host memory of a store."""
    NVME = 2


class KVEventKind(IntEnum):
    """Numbers are those on the wire."""

    PUBLISH = 1
    """Cached now, or on another tier than before."""
    RETRACT = 2


@dataclass(frozen=True, slots=True)
class KVEvent:
    kind: KVEventKind
    block_hash: bytes
    tier: Tier = Tier.WORKER
    """Of a publication; a retraction is of the block, wherever it was."""


@dataclass(frozen=True, slots=True)
class KVEvents(Sequence[KVEvent]):
    """Events as columns: on the wire and in an index no object stands for an event.

    Raises ValueError where the columns differ in length.
    """

    kinds: bytes = b""
    """A byte an event: kind | tier << 4. What is no known publication is a retraction: hints may be missing."""
    hashes: bytes = b""
    """HASH_BYTES an event."""

    def __post_init__(self) -> None:
        if len(self.hashes) != HASH_BYTES * len(self.kinds):
            raise ValueError(
                f"hashes: {len(self.hashes)} bytes for {len(self.kinds)} events; a block hash has {HASH_BYTES}"
            )

    @classmethod
    def of(cls, events: Sequence[KVEvent]) -> "KVEvents":
        """Raises ValueError for a hash of another length."""
        if isinstance(events, cls):
            return events
        kinds = bytes(event.kind | event.tier << _TIER_SHIFT for event in events)
        return cls(kinds, pack_hashes([event.block_hash for event in events]))

    @classmethod
    def published(cls, hashes: Sequence[bytes], tier: Tier = Tier.WORKER) -> "KVEvents":
        """Raises ValueError for a hash of another length."""
        return cls(bytes((KVEventKind.PUBLISH | tier << _TIER_SHIFT,)) * len(hashes), pack_hashes(hashes))

    @classmethod
    def retracted(cls, hashes: Sequence[bytes]) -> "KVEvents":
        """Raises ValueError for a hash of another length."""
        return cls(bytes((KVEventKind.RETRACT,)) * len(hashes), pack_hashes(hashes))

    def __len__(self) -> int:
        return len(self.kinds)

    @overload
    def __getitem__(self, at: int) -> KVEvent: ...

    @overload
    def __getitem__(self, at: slice) -> "KVEvents": ...

    def __getitem__(self, at: int | slice) -> "KVEvent | KVEvents":
        places = range(len(self))[at]
        if isinstance(places, int):
            return _event(self.kinds[places], self._hash(places))
        if places.step == 1:
            first = places.start * HASH_BYTES
            kinds = self.kinds[places.start : places.start + len(places)]
            return KVEvents(kinds, self.hashes[first : first + len(places) * HASH_BYTES])
        return KVEvents.of([self[place] for place in places])

    def _hash(self, at: int) -> bytes:
        return self.hashes[at * HASH_BYTES : (at + 1) * HASH_BYTES]

    def published_on(self, tier: Tier) -> list[bytes]:
        """Hashes of the blocks that were published there."""
        kind = KVEventKind.PUBLISH | tier << _TIER_SHIFT
        return [
            self.hashes[at * HASH_BYTES : (at + 1) * HASH_BYTES] for at, was in enumerate(self.kinds) if was == kind
        ]

    def __add__(self, later: "KVEvents") -> "KVEvents":
        return KVEvents(self.kinds + later.kinds, self.hashes + later.hashes)


def pack_hashes(hashes: Iterable[bytes]) -> bytes:
    """Raises ValueError for a hash that has not HASH_BYTES bytes."""
    hashes = list(hashes)
    packed = b"".join(hashes)
    if len(packed) != HASH_BYTES * len(hashes) or any(len(block_hash) != HASH_BYTES for block_hash in hashes):
        wrong = next(len(block_hash) for block_hash in hashes if len(block_hash) != HASH_BYTES)
        raise ValueError(f"a block hash has {HASH_BYTES} bytes, not {wrong}")
    return packed


def _event(kind: int, block_hash: bytes) -> KVEvent:
    tier = kind >> _TIER_SHIFT
    if kind & _KIND_MASK == KVEventKind.PUBLISH and tier <= Tier.NVME:
        return KVEvent(KVEventKind.PUBLISH, block_hash, Tier(tier))
    return KVEvent(KVEventKind.RETRACT, block_hash)

"""What a worker tells the prefix index about its cached blocks."""

from dataclasses import dataclass
from enum import IntEnum


class KVEventKind(IntEnum):
    """Numbers are those of `tailrace.v1.KvEvent.Kind` on the wire."""

    PUBLISH = 1
    RETRACT = 2


@dataclass(frozen=True, slots=True)
class KVEvent:
    kind: KVEventKind
    block_hash: bytes

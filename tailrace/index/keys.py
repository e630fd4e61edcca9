"""The names of all Redis keys and the form of their values. Nothing outside this room knows them.

With the namespace `tailrace` and key space version 1:

| key | type | value |
| --- | --- | --- |
| `tailrace:version` | string | the version of the key space |
| `tailrace:1:{xx}H` | string, expires | who holds the block with hash H: an entry of 8 bytes each |
| `tailrace:1:{registry}:names` | set | ids of the registered workers |
| `tailrace:1:{registry}:worker:ID` | string, expires | a worker's signed registration |
| `tailrace:1:{registry}:gateway:ID` | string, expires | a gateway that follows the registry |
| `tailrace:1:{events-N}` | stream | publications and retractions, of the workers of shard N |
| `tailrace:1:{reservations}` | stream | what each gateway has sent to workers and they have not computed |

What stands in braces decides the slot on a Redis Cluster. `xx` are the first two hex digits of the block's hash: the
blocks of one prompt lie on all nodes, and one node's share of a lookup is one search.
"""

from binascii import crc_hqx
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from tailrace.kv.events import KVEvents, Tier
from tailrace.messages import KvEventBatch

VERSION = b"1"
NUM_SLOTS = 16384
NUM_STREAMS = 8
MARK_BYTES = 7
ENTRY_BYTES = MARK_BYTES + 1
MAX_HOLDERS = 64
"""Of one block, in Redis; beyond it the one who published longest ago is forgotten."""
MAX_EVENTS = 512
"""In one message of a stream, about 9 KB."""
MAX_MESSAGES = 1024
"""In one stream, about: slower readers find a gap. All streams at their fullest hold 75 MB."""
_WORKER, _EPOCH, _SEQUENCE, _KINDS, _HASHES = b"worker", b"epoch", b"sequence", b"kinds", b"hashes"


@dataclass(frozen=True, slots=True)
class Life:
    """What an entry stands for: a worker, one start of it, and one of its editions.

    An edition is what the worker has written since it last knew that all of it was true: when it has lost count of what
    it must retract, it begins another, and its entries before are void without anybody looking for them.
    """

    worker_id: str
    epoch: int
    edition: int = 0

    @property
    def mark(self) -> bytes:
        """Its name in an entry; 56 bits, so that the lives of a whole cluster do not meet."""
        text = f"{self.worker_id}\0{self.epoch}\0{self.edition}"
        return blake2b(text.encode(), digest_size=MARK_BYTES).digest()

    def entry(self, tier: Tier) -> bytes:
        return self.mark + bytes([tier])


def entries(value: bytes) -> Iterator[tuple[bytes, int]]:
    """(mark, tier) of each holder. Of a value that nobody here wrote, at worst marks that no worker has."""
    for start in range(0, len(value) - ENTRY_BYTES + 1, ENTRY_BYTES):
        yield value[start : start + MARK_BYTES], value[start + MARK_BYTES]


class KeySpace:
    """The keys of one namespace."""

    def __init__(self, namespace: str) -> None:
        base = f"{namespace}:{VERSION.decode()}:"
        self.version = f"{namespace}:version".encode()
        self.names = f"{base}{{registry}}:names".encode()
        self._worker = f"{base}{{registry}}:worker:"
        self._gateway = f"{base}{{registry}}:gateway:"
        self.streams = tuple(f"{base}{{events-{number}}}".encode() for number in range(NUM_STREAMS))
        self.reservations = f"{base}{{reservations}}".encode()
        self.before_braces = base.encode()
        """Of a block's key."""
        self._blocks = tuple(f"{base}{{{first:02x}}}".encode() for first in range(256))
        self.slots = tuple(crc_hqx(b"%02x" % first, 0) % NUM_SLOTS for first in range(256))
        """Of a Cluster, where a block lies, by the first byte of its hash: CRC16 of what stands in braces."""

    def worker(self, worker_id: str) -> bytes:
        return f"{self._worker}{worker_id}".encode()

    def gateway(self, gateway_id: str) -> bytes:
        return f"{self._gateway}{gateway_id}".encode()

    def stream_of(self, worker_id: str) -> bytes:
        return self.streams[blake2b(worker_id.encode(), digest_size=1).digest()[0] % NUM_STREAMS]

    def blocks(self, hashes: Sequence[bytes]) -> list[bytes]:
        heads = self._blocks
        return [heads[block_hash[0]] + block_hash for block_hash in hashes]

    @staticmethod
    def by_slot(hashes: Sequence[bytes], keys: Sequence[bytes]) -> list[list[bytes]]:
        """The keys of these blocks, grouped so that a group lies in one slot of a Cluster."""
        groups: dict[int, list[bytes]] = {}
        for block_hash, key in zip(hashes, keys, strict=True):
            groups.setdefault(block_hash[0], []).append(key)
        return list(groups.values())


# -- messages of a stream ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StreamMessage:
    """Events of a worker."""

    worker_id: str
    batch: KvEventBatch

    def fields(self) -> list[bytes]:
        """Names and values, one after the other."""
        batch = self.batch
        head = [_WORKER, self.worker_id.encode(), _EPOCH, b"%d" % batch.epoch, _SEQUENCE, b"%d" % batch.first_sequence]
        return [*head, _KINDS, batch.events.kinds, _HASHES, batch.events.hashes]

    @classmethod
    def read(cls, fields: Mapping[object, object]) -> "StreamMessage":
        """Raises ValueError for what no worker wrote."""
        values = [fields.get(name) for name in (_WORKER, _EPOCH, _SEQUENCE, _KINDS, _HASHES)]
        texts = [value for value in values if isinstance(value, bytes)]
        if len(texts) < len(values):
            raise ValueError(f"a message with the fields {', '.join(map(repr, list(fields)[:8]))}")
        worker_id, epoch, sequence, kinds, hashes = texts
        if len(kinds) > MAX_EVENTS or int(sequence) < 0:
            raise ValueError(f"a message of {len(kinds)} events from number {int(sequence)}")
        return cls(worker_id.decode(), KvEventBatch(int(epoch), int(sequence), KVEvents(kinds, hashes)))

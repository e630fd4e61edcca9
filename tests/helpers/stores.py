"""Stores with small blocks whose bytes say which block they are."""

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from tailrace.kv.layout import KVLayout
from tailrace.kvstore.loan import Loan
from tailrace.kvstore.slab_file import open_slab
from tailrace.kvstore.store import KvStore
from tests.helpers.values import make_layout

PAGED = {"head_dim": 64, "block_size": 16}
"""Of a layout whose blocks are whole pages."""


def chain_of(name: str, length: int) -> list[bytes]:
    return [blake2b(f"{name}{index}".encode(), digest_size=16).digest() for index in range(length)]


def bytes_of(block_hash: bytes, num_bytes: int) -> bytes:
    return (block_hash * (num_bytes // 16 + 1))[:num_bytes]


def make_store(
    path: Path | None = None, *, slots: int = 8, disk_slots: int = 32, layout: KVLayout | None = None
) -> KvStore:
    """With a disk tier where there is a path."""
    layout = layout or make_layout()
    store = KvStore(layout.block_bytes, slots, epoch=5)
    if path is not None:
        store.open_disk(open_slab(path, disk_slots, layout), lambda: None)
    return store


def put(store: KvStore, chain: Sequence[bytes], tenant: str = "") -> int:
    """Offer a chain and bring what is wanted; the number of blocks brought. Waits for nothing."""
    arrivals = store.reserve(store.wanted(chain, tenant), tenant)
    for arrival in arrivals:
        store.slot_bytes(arrival.slot)[:] = bytes_of(arrival.block.block_hash, store.block_bytes)
    store.landed(arrivals)
    return len(arrivals)


def put_written(store: KvStore, chain: Sequence[bytes], tenant: str = "") -> int:
    """As `put`, and all of it is on disk afterwards."""
    num_put = put(store, chain, tenant)
    assert store.flush(5.0)
    return num_put


def fetch(store: KvStore, chain: Sequence[bytes]) -> Loan:
    """Borrow, and wait for the disk. Asserts that every block that was lent has the bytes that were put."""
    loan = store.borrow(chain)
    num_ready = 0
    while True:
        for lent in loan.take_ready():
            assert lent.index == num_ready
            assert store.slot_bytes(lent.slot) == bytes_of(chain[lent.index], store.block_bytes)
            num_ready += 1
        if loan.is_complete:
            return loan
        store.pump(5.0)


def num_found(store: KvStore, chain: Sequence[bytes]) -> int:
    """Blocks of the chain that a needer gets, all with the right bytes."""
    loan = fetch(store, chain)
    loan.close()
    return loan.num_told

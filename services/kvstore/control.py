"""What operators ask of a store: pins, quotas, and who has how much."""

import heapq
from collections.abc import Sequence

from services.kvstore.storage import Storage
from tailrace.errors import NotFoundError, OverloadedError
from tailrace.kvstore.pins import MAX_OWNERS
from tailrace.kvstore.slots import MAX_QUOTAS, SlotTable, TierLedger
from tailrace.messages import StoreUsage, TenantUsage, TierUsage

MAX_TENANTS = 1000
"""Told of in one answer."""


def pin(storage: Storage, owner: str, hashes: Sequence[bytes]) -> int:
    """The number of blocks pinned by all owners. Raises NotFoundError, OverloadedError; then nothing is pinned."""
    pins = storage.store.pins
    if (refusal := storage.store.pin(hashes, owner)) is None:
        return pins.num_blocks
    if refusal.num_missing:
        raise NotFoundError(f"block_hashes: {refusal.num_missing} of {len(hashes)} are not here", param="block_hashes")
    if refusal.num_owners:
        raise OverloadedError(f"owner: there are {MAX_OWNERS} owners of pins already", param="owner")
    raise OverloadedError(
        f"block_hashes: {refusal.num_beyond} too many; {pins.num_blocks} blocks of at most {pins.limit} are pinned",
        param="block_hashes",
    )


def set_quota(storage: Storage, tenant: str, memory_bytes: int | None, disk_bytes: int | None) -> None:
    """Raises OverloadedError where too many tenants have one."""
    memory, disk = (None if size is None else size // storage.layout.block_bytes for size in (memory_bytes, disk_bytes))
    if not storage.store.set_quota(tenant, memory, disk):
        raise OverloadedError(f"tenant: {MAX_QUOTAS} tenants have a quota already", param="tenant")


def usage(storage: Storage) -> StoreUsage:
    store = storage.store
    books, disk = store.ledger(), store.disk
    return StoreUsage(
        layout=storage.layout,
        memory=_tier(books.memory),
        disk=_tier(books.disk) if disk is not None else None,
        tenants=_tenants(store.memory, disk.slots if disk is not None else None),
        pinned=store.pins.owners(),
        pin_limit=store.pins.limit,
        disk_trouble=storage.why_no_disk or (disk.why_off if disk is not None else ""),
    )


def _tier(ledger: TierLedger) -> TierUsage:
    return TierUsage(ledger.total, ledger.free, ledger.cached, ledger.lent, ledger.landing, ledger.quarantined)


def _tenants(memory: SlotTable, disk: SlotTable | None) -> tuple[TenantUsage, ...]:
    in_memory, on_disk = memory.tenants(), disk.tenants() if disk is not None else {}
    quotas = disk.quotas if disk is not None else {}
    bound = memory.quotas.keys() | quotas.keys()

    def rank(name: str) -> tuple[bool, int, int, str]:
        return name not in bound, -in_memory.get(name, 0), -on_disk.get(name, 0), name

    # Requests name themselves: an operator must find those that he has bound among any number of others.
    first = heapq.nsmallest(MAX_TENANTS, {*in_memory, *on_disk, *bound}, key=rank)
    return tuple(
        TenantUsage(name, in_memory.get(name, 0), on_disk.get(name, 0), memory.quotas.get(name), quotas.get(name))
        for name in first
    )

"""The store's tiers and its way to peers, made as soon as it is known what a block is: from its file, or from the
first offer."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tailrace.config import KvStoreConfig
from tailrace.errors import ConfigError
from tailrace.host_memory import lock_memory, map_memory, residence_of
from tailrace.kv.layout import KVLayout
from tailrace.kvstore.slab_file import num_slots_in, open_slab
from tailrace.kvstore.slab_header import peek
from tailrace.kvstore.store import KvStore
from tailrace.kvstore.warming import Warming
from tailrace.transfer import PoolMemory, TransferPlane, open_transfer
from tailrace.transfer.memory import address_of
from tailrace.worker.member import Identity, transfer_options

log = logging.getLogger(__name__)

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Storage:
    layout: KVLayout
    store: KvStore
    plane: TransferPlane
    why_no_disk: str
    """Why there is no disk tier although one was asked for; empty where there is."""
    warming: Warming

    async def close(self) -> None:
        """Nobody reads or writes the memory any more afterwards; what was kept is on disk."""
        await asyncio.to_thread(self.warming.stop)
        await self.plane.close()
        await asyncio.to_thread(self.store.close)


def known_layout(path: Path | None) -> KVLayout | None:
    """What the file of an earlier life says; None where there is none.

    Raises ConfigError for a file that is not a store's. A disk that fails is said, and left to `open_storage`.
    """
    try:
        header = peek(path) if path is not None else None
    except OSError as error:
        log.warning("store file %s cannot be read: %s", path, error)
        return None
    return header.layout if header is not None else None


def check_memory(num_bytes: int) -> None:
    """Raises ConfigError where the machine has no such memory. Takes none of it."""
    try:
        map_memory(num_bytes)
    except (OSError, OverflowError) as error:
        raise _no_memory(num_bytes, error) from None


def _no_memory(num_bytes: int, error: Exception) -> ConfigError:
    why = getattr(error, "strerror", None) or error
    return ConfigError(f"cpu_memory: {num_bytes} bytes cannot be had: {why}", param="cpu_memory")


async def open_storage(
    config: KvStoreConfig, identity: Identity, layout: KVLayout, on_done: Callable[[], None]
) -> Storage:
    """Raises ConfigError for a memory too small or large, a file that is refused and a transport that cannot be had.

    A disk that fails is no error: the store goes on without it, and says so.
    """
    num_slots = config.cpu_memory // layout.block_bytes
    if num_slots < 1:
        raise ConfigError(
            f"cpu_memory: {config.cpu_memory} bytes hold no block of {layout.block_bytes}", param="cpu_memory"
        )
    try:
        store = await asyncio.to_thread(KvStore, layout.block_bytes, num_slots, epoch=identity.epoch)
    except OSError as error:
        raise _no_memory(config.cpu_memory, error) from None
    why_no_disk = ""
    if config.disk_path is not None:
        why_no_disk = await asyncio.to_thread(_open_disk, store, config.disk_path, config.disk_bytes, layout, on_done)
    try:
        plane = await open_transfer(_memory_of(store), transfer_options(config, identity))
    except BaseException:
        await asyncio.to_thread(store.close)
        raise
    log.info("blocks of %d bytes (%s): %s", layout.block_bytes, layout.arithmetic, _sizes(store))
    why_not_locked = lock_memory(store.view)
    warming = Warming(store.first_touch, lambda: _say_memory(store.view, why_not_locked))
    return Storage(layout, store, plane, why_no_disk, warming)


def _say_memory(memory: memoryview, why_not_locked: str) -> None:
    """What the machine gave it."""
    if (found := residence_of(memory)) is not None:
        lock = f"not locked: {why_not_locked}" if why_not_locked else "locked, so never swapped out"
        log.info("memory tier: %.1f MiB, %.1f of it in huge pages; %s", found.present / _MIB, found.huge / _MIB, lock)


def _open_disk(store: KvStore, path: Path, num_bytes: int, layout: KVLayout, on_done: Callable[[], None]) -> str:
    """Why there is none, or ''. Raises ConfigError, LayoutMismatchError for a file that is refused."""
    try:
        slab = open_slab(path, num_slots_in(num_bytes, layout), layout)
        try:
            store.open_disk(slab, on_done)
        except BaseException:
            slab.close()
            raise
    except OSError as error:
        log.error("no disk tier, the memory tier goes on alone: store file %s: %s", path, error)
        return str(error)
    counters = store.counters
    log.info("store file %s: %d blocks found, %d dropped", path, counters.restored, counters.restored_bad)
    return ""


def _memory_of(store: KvStore) -> PoolMemory:
    return PoolMemory(
        address=address_of(store.view),
        block_bytes=store.block_bytes,
        num_blocks=store.memory.num_slots,
        view=store.view,
        stamps=store.memory.stamps,
    )


def _sizes(store: KvStore) -> str:
    memory = f"{store.memory.num_slots} in memory"
    return memory if store.disk is None else f"{memory}, {store.disk.slots.num_slots} on disk"

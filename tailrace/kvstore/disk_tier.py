"""DiskTier: the slots of a slab file, and whether the file can still be used."""

import array
import logging
from collections.abc import Callable, Iterable

from tailrace.kvstore.disk_io import DiskIo, ReadJob, WriteJob
from tailrace.kvstore.slab_file import Entry, SlabFile
from tailrace.kvstore.slots import SlotState, SlotTable, StoredBlock

log = logging.getLogger(__name__)


class DiskTier:
    """Used by one thread, the store's."""

    def __init__(self, file: SlabFile, on_done: Callable[[], None]) -> None:
        self.file = file
        self.slots = SlotTable(file.num_slots)
        self.why_off = ""
        """Why nothing is read or written any more; empty while all is well."""
        self._checksums = array.array("I", bytes(4 * file.num_slots))
        self._io = DiskIo(file, on_done)
        self._has_ended = False
        self._corrupt: set[int] = set()
        """Slots whose entries are void; `close` clears those that nobody has written since."""

    @property
    def is_on(self) -> bool:
        return not self.why_off

    @property
    def can_write(self) -> bool:
        return self.is_on and not self._io.writes.is_full

    @property
    def can_read(self) -> bool:
        return self.is_on and not self._io.reads.is_full

    @property
    def num_open(self) -> int:
        """Jobs posted and not taken back."""
        return self._io.writes.num_open + self._io.reads.num_open

    def restore(self) -> tuple[list[StoredBlock], int]:
        """The blocks that the file has, and the number of entries that cannot be believed. Raises OSError."""
        entries, num_bad = self.file.entries()
        found = {
            slot: StoredBlock(e.block_hash, e.depth, e.tenant, e.moment, e.uses, disk_slot=slot)
            for slot, e in entries.items()
        }
        for slot, entry in entries.items():
            self._checksums[slot] = entry.checksum
        self.slots.restore(found)
        return list(found.values()), num_bad

    def post_write(self, block: StoredBlock, memory_slot: int, disk_slot: int, data: memoryview) -> None:
        self._io.writes.post(WriteJob(block, memory_slot, disk_slot, _entry_of(block), data))

    def post_read(self, block: StoredBlock, memory_slot: int, disk_slot: int, target: memoryview) -> None:
        self._io.reads.post(ReadJob(block, memory_slot, disk_slot, self._checksums[disk_slot], target))

    def take_writes(self, timeout_s: float = 0.0) -> list[WriteJob]:
        """Those that have ended. The slot of a good one holds its block now; a bad one turns the tier off."""
        done = self._io.writes.take_done(timeout_s)
        for job in done:
            if job.error is not None:
                self._turn_off("written", job.error)
            job.is_good = self.is_on
            if job.is_good:
                self._checksums[job.disk_slot] = job.checksum
                self.slots.landed(job.disk_slot, job.block)
            else:
                self.slots.abandon(job.disk_slot)
        return done

    def take_reads(self, timeout_s: float = 0.0) -> list[ReadJob]:
        """Those that have ended; an error turns the tier off."""
        done = self._io.reads.take_done(timeout_s)
        for job in done:
            if job.error is not None:
                self._turn_off("read", job.error)
            self.slots.release(job.disk_slot)
        return done

    def forget_corrupt(self, block: StoredBlock, disk_slot: int) -> None:
        """Its bytes are not those that were written: nobody shall find them again.

        After a restart neither, where `close` is called; else they are found out again. Clearing the entry now would
        make the store's thread wait for the disk.
        """
        log.warning(
            "store file %s: block %s in slot %d is corrupt (its checksum does not fit); it is dropped",
            self.file.path,
            block.block_hash.hex(),
            disk_slot,
        )
        self.slots.drop(disk_slot)
        self._corrupt.add(disk_slot)

    def end(self) -> None:
        """Waits for what is posted, so that it can be taken; nothing may be posted any more."""
        self._has_ended = self._io.close()

    def close(self, blocks: Iterable[StoredBlock], num_unwritten: int) -> None:
        """Keeps what is known of the blocks' usage for the next start. After `end`.

        `num_unwritten`: blocks that were never posted, for the log.
        """
        if num_left := num_unwritten + self._io.writes.num_open:
            log.warning("store file %s: there was no time to write %d blocks; they are lost", self.file.path, num_left)
        if not self._has_ended:
            log.warning("store file %s: the disk does not answer; the file is left as it is", self.file.path)
            return
        try:
            for block in blocks if self.is_on else ():
                if block.disk_slot is not None:
                    self.file.describe(block.disk_slot, _entry_of(block, self._checksums[block.disk_slot]))
            for slot in self._corrupt if self.is_on else ():
                if self.slots.state(slot) is SlotState.FREE:
                    self.file.clear(slot)
            self.file.sync()
        except OSError as error:
            log.warning("store file %s: could not be brought up to date: %s", self.file.path, error)
        self.file.close()

    def _turn_off(self, verb: str, error: OSError) -> None:
        if self.is_on:
            self.why_off = f"{self.file.path} cannot be {verb}: {error}"
            log.error("the disk tier is off until the next start, the memory tier goes on: %s", self.why_off)


def _entry_of(block: StoredBlock, checksum: int = 0) -> Entry:
    return Entry(block.block_hash, block.depth, block.tenant, block.moment, block.uses, checksum)

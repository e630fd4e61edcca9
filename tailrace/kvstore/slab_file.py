"""SlabFile: one file of fixed-size slots, each of which holds one block, that outlives the process.

Three parts, each on a page boundary: the header (what the file is; written once), the table (one entry a slot: which
block, and the checksum of its bytes) and the slots. A write clears the slot's entry, writes the bytes, then writes the
entry: whoever dies in between leaves a slot without a block. The order in which a machine that loses power keeps these
is not relied on: entry and bytes each have a checksum, and what does not fit is dropped.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import queue
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tailrace.errors import ConfigError
from tailrace.host_memory import map_memory
from tailrace.kv.hashing import HASH_BYTES
from tailrace.kv.layout import KVLayout
from tailrace.kvstore.slab_header import HEADER_BYTES, PAGE, SlabHeader, claim

MAX_TENANT_BYTES = 64
_ENTRY = struct.Struct(f"<{HASH_BYTES}sIIQIB{MAX_TENANT_BYTES}s")
"""hash, depth, uses, moment, CRC of the bytes, bytes of the tenant's name, the name; then the CRC of all that."""
_CRC = struct.Struct("<I")
ENTRY_BYTES = 128
_NO_ENTRY = bytes(ENTRY_BYTES)
_MAX_MOMENT = 1 << 63
"""What a store would never count up to; beyond it there might be no room for the moments that come."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What the table says of one slot."""

    block_hash: bytes
    depth: int
    tenant: str
    moment: int
    uses: int
    checksum: int = 0
    """See `checksum_of`."""


def checksum_of(block_hash: bytes, data: memoryview) -> int:
    """CRC-32 of the block's bytes, begun with its hash, so that another block's bytes do not fit."""
    return zlib.crc32(data, zlib.crc32(block_hash))


class SlabFile:
    """Held open, and locked, by one store. `read` and `write` may be called from any thread, for different slots."""

    def __init__(self, path: Path, header: SlabHeader, fd: int, direct_fd: int | None) -> None:
        """Made by `open_slab`, which gives it both descriptors. `direct_fd`: None without O_DIRECT."""
        self.path = path
        self.layout = header.layout
        self.num_slots = header.num_slots
        self.block_bytes = header.layout.block_bytes
        self._fd = fd
        self._direct_fd = direct_fd
        self._data_fd = fd if direct_fd is None else direct_fd
        self._slot_bytes = _rounded(self.block_bytes)
        self._data_offset = HEADER_BYTES + _rounded(ENTRY_BYTES * header.num_slots)
        self._bounces: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()

    @property
    def is_direct(self) -> bool:
        """Whether reads and writes of blocks go past the page cache."""
        return self._direct_fd is not None

    @property
    def num_bytes(self) -> int:
        return self._data_offset + self._slot_bytes * self.num_slots

    def preallocate(self) -> None:
        """Take all the room that the file will ever need. Raises OSError, having given back what it took."""
        size = os.fstat(self._fd).st_size
        try:
            os.posix_fallocate(self._fd, 0, self.num_bytes)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, max(size, HEADER_BYTES))
                raise
            os.ftruncate(self._fd, self.num_bytes)

    def entries(self) -> tuple[dict[int, Entry], int]:
        """By slot, what the table says; and how many entries say nothing that can be believed. Raises OSError.

        Of two entries of one block the one with the later moment counts; the other slot is as good as empty.
        """
        table = _read_all(self._fd, ENTRY_BYTES * self.num_slots, HEADER_BYTES)
        size = os.fstat(self._fd).st_size
        found: dict[int, Entry] = {}
        newest: dict[bytes, int] = {}
        num_bad = 0
        for slot in range(self.num_slots):
            packed = table[slot * ENTRY_BYTES : (slot + 1) * ENTRY_BYTES]
            if not packed or packed == _NO_ENTRY:
                continue
            entry = _entry_from(packed)
            if entry is None or self._offset(slot) + self._slot_bytes > size:
                num_bad += 1
                continue
            rival = newest.get(entry.block_hash)
            if rival is not None and found[rival].moment >= entry.moment:
                continue
            if rival is not None:
                del found[rival]
            newest[entry.block_hash] = slot
            found[slot] = entry
        return found, num_bad

    def write(self, slot: int, entry: Entry, data: memoryview) -> int:
        """Put a block into a slot; gives its checksum. Raises OSError; the slot then holds nothing."""
        checksum = checksum_of(entry.block_hash, data)
        self.clear(slot)
        if self._is_aligned(data):
            written = os.pwritev(self._data_fd, [data], self._offset(slot))
        else:
            with self._bounce() as bounce:
                bounce[: len(data)] = data
                written = os.pwritev(self._data_fd, [bounce], self._offset(slot))
        if written < self.block_bytes:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {written} of {self.block_bytes} bytes written")
        self.describe(slot, replace(entry, checksum=checksum))
        return checksum

    def describe(self, slot: int, entry: Entry) -> None:
        """Write the slot's entry alone. Raises OSError."""
        os.pwrite(self._fd, _entry_to(entry), self._entry_offset(slot))

    def read(self, slot: int, block_hash: bytes, checksum: int, target: memoryview) -> bool:
        """Whether `target` holds the block now: False for bytes that are not what was written. Raises OSError."""
        if self._is_aligned(target):
            num_read = os.preadv(self._data_fd, [target], self._offset(slot))
        else:
            with self._bounce() as bounce:
                num_read = os.preadv(self._data_fd, [bounce], self._offset(slot))
                target[:] = bounce[: len(target)]
        return num_read >= self.block_bytes and checksum_of(block_hash, target) == checksum

    def clear(self, slot: int) -> None:
        """The slot holds nothing any more. Raises OSError."""
        os.pwrite(self._fd, _NO_ENTRY, self._entry_offset(slot))

    def sync(self) -> None:
        """Raises OSError."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Gives up the lock. Called once, when nothing reads or writes any more."""
        for fd in (self._direct_fd, self._fd):
            if fd is not None:
                os.close(fd)

    def _offset(self, slot: int) -> int:
        return self._data_offset + slot * self._slot_bytes

    @staticmethod
    def _entry_offset(slot: int) -> int:
        return HEADER_BYTES + slot * ENTRY_BYTES

    def _is_aligned(self, data: memoryview) -> bool:
        if self._direct_fd is None:
            return True
        address = ctypes.addressof(ctypes.c_char.from_buffer(data))
        return address % PAGE == 0 and len(data) % PAGE == 0

    @contextlib.contextmanager
    def _bounce(self) -> Iterator[memoryview]:
        """A whole slot of aligned memory; as many are made as are used at once."""
        try:
            buffer = self._bounces.get_nowait()
        except queue.Empty:
            buffer = map_memory(self._slot_bytes)
        view = memoryview(buffer)
        try:
            yield view
        finally:
            view.release()
            self._bounces.put(buffer)


def open_slab(path: Path, num_slots: int, layout: KVLayout) -> SlabFile:
    """The file at `path`, made where there is none or an empty one; all of its room is taken now.

    Raises ConfigError for a file that is another's, of another version or of another size, or that another store has
    open; LayoutMismatchError naming the fields; OSError where the file cannot be had, or not all of its room.
    """
    fd, header = claim(path, SlabHeader(layout, num_slots))
    direct_fd = None
    try:
        with contextlib.suppress(OSError, AttributeError):  # a file system, or a platform, without it
            direct_fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
        slab = SlabFile(path, header, fd, direct_fd)
        slab.preallocate()
    except BaseException:
        for opened in (direct_fd, fd):
            if opened is not None:
                os.close(opened)
        raise
    return slab


def num_slots_in(num_bytes: int, layout: KVLayout) -> int:
    """Slots of the largest file that has at most `num_bytes`. Raises ConfigError where that is none."""
    num_slots = (num_bytes - HEADER_BYTES - PAGE) // (_rounded(layout.block_bytes) + ENTRY_BYTES)
    if num_slots < 1:
        raise ConfigError(f"disk_bytes: {num_bytes} bytes hold no block of {layout.block_bytes}", param="disk_bytes")
    return num_slots


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // PAGE) * PAGE


def _entry_to(entry: Entry) -> bytes:
    tenant = entry.tenant.encode()
    packed = _ENTRY.pack(
        entry.block_hash,
        entry.depth,
        min(entry.uses, 0xFFFFFFFF),
        entry.moment,
        entry.checksum,
        len(tenant),
        tenant,
    )
    return (packed + _CRC.pack(zlib.crc32(packed))).ljust(ENTRY_BYTES, b"\0")


def _entry_from(packed: bytes) -> Entry | None:
    """None for bytes that no entry has."""
    if len(packed) < ENTRY_BYTES or _CRC.unpack_from(packed, _ENTRY.size)[0] != zlib.crc32(packed[: _ENTRY.size]):
        return None
    block_hash, depth, uses, moment, checksum, num_name, name = _ENTRY.unpack_from(packed)
    if moment > _MAX_MOMENT:
        return None
    try:
        return Entry(block_hash, depth, name[:num_name].decode(), moment, uses, checksum)
    except UnicodeDecodeError:
        return None


def _read_all(fd: int, num_bytes: int, offset: int) -> bytes:
    """Up to `num_bytes`; fewer where the file ends."""
    pieces: list[bytes] = []
    while num_bytes > 0 and (piece := os.pread(fd, min(num_bytes, 1 << 24), offset)):
        pieces.append(piece)
        offset += len(piece)
        num_bytes -= len(piece)
    return b"".join(pieces)

"""Memory of this process for what is large and read in bulk: pools of blocks, packed weights."""

import contextlib
import ctypes
import mmap
import os
import re
import resource
from dataclasses import dataclass
from pathlib import Path

PIECE_BYTES = 2 << 20
"""One huge page."""
_MADV_POPULATE_WRITE = 23
"""Of Linux since 5.14; Python has no name for it."""
_MLOCK_ONFAULT = 1
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")


@dataclass(frozen=True, slots=True)
class Residence:
    """What the kernel says of a piece of memory, in bytes."""

    present: int
    huge: int
    """Of it, in huge pages."""
    locked: int
    """Of it, never swapped out."""


def map_memory(num_bytes: int) -> mmap.mmap:
    """Zeroed, page-aligned, in huge pages where the kernel has them. A page takes no memory before it is touched.

    Private: a shared mapping would be charged to shared memory, which containers keep small. Raises OSError for
    no bytes, and where there is no room.
    """
    mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them; small pages serve as well
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


def lock_memory(memory: memoryview) -> str:
    """Keeps each page from being swapped out, from when it is first touched. Why that cannot be, or ''."""
    try:
        mlock2 = ctypes.CDLL(None, use_errno=True).mlock2
    except (AttributeError, OSError):
        return "this system cannot lock pages as they are touched"
    mlock2.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if mlock2(_address_of(memory), len(memory), _MLOCK_ONFAULT) == 0:
        return ""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return f"{os.strerror(ctypes.get_errno())} (this process may lock {limit} bytes, see ulimit -l)"


def residence_of(memory: memoryview) -> Residence | None:
    """None where the kernel does not say. Neighbours count in where the kernel joined their mappings with this one."""
    first = _address_of(memory)
    found = {"Rss": 0, "AnonHugePages": 0, "Locked": 0}
    is_ours = False
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if mapping := _MAPPING.match(line):
            is_ours = int(mapping[1], 16) < first + len(memory) and first < int(mapping[2], 16)
        elif is_ours:
            name, _, value = line.partition(":")
            if name in found:
                found[name] += int(value.split()[0]) << 10
    return Residence(*(min(num_bytes, len(memory)) for num_bytes in found.values()))


class FirstTouch:
    """Gives a mapping its memory piece by piece, and leaves what it holds, whoever writes there meanwhile.

    On a virtual machine a huge page that nobody had before takes 5 ms (measured), which somebody would wait for later.
    """

    def __init__(self, mapping: mmap.mmap) -> None:
        self._mapping = mapping
        self._num_touched = 0
        """Leading bytes that have their memory."""

    def more(self) -> bool:
        """The next piece. False: there is nothing left to do. Holds no interpreter lock."""
        total = len(self._mapping)
        if self._num_touched >= total:
            return False
        size = min(PIECE_BYTES, total - self._num_touched)
        if not _populate(self._mapping, self._num_touched, size):
            # An older kernel, or no memory: first touches will show.
            size = total
        self._num_touched += size
        return self._num_touched < total


def _populate(mapping: mmap.mmap, start: int, size: int) -> bool:
    """As `mapping.madvise`, which would keep every other thread of the interpreter waiting."""
    try:
        madvise = ctypes.CDLL(None).madvise
    except (AttributeError, OSError):
        return False
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return bool(madvise(_address_of(mapping) + start, size, _MADV_POPULATE_WRITE) == 0)


def _address_of(memory: mmap.mmap | memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))

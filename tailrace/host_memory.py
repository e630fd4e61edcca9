"""Memory of this process for what is large and read in bulk: pools of blocks, packed weights."""

import contextlib
import ctypes
import mmap

PIECE_BYTES = 2 << 20
"""One huge page."""
_MADV_POPULATE_WRITE = 23
"""Of Linux since 5.14; Python has no name for it."""


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
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping, start))
    return bool(madvise(address, size, _MADV_POPULATE_WRITE) == 0)

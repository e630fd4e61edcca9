"""Memory of this process for what is large and read in bulk: pools of blocks, packed weights."""

import contextlib
import mmap


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

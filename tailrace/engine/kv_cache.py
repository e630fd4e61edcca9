"""KVCache: one page-aligned allocation of blocks, readable by others at an address."""

import contextlib
import mmap

import torch
from torch import Tensor

from tailrace.kv.layout import KVLayout


class KVCache:
    """`num_blocks` blocks of a layout. On a CPU pages come zeroed and only when they are first touched."""

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device) -> None:
        self.num_blocks = num_blocks
        self.block_bytes = layout.block_bytes
        self._mapping: mmap.mmap | None = None
        dtype: torch.dtype = getattr(torch, layout.kv_dtype)
        shape = (num_blocks, *layout.block_shape)
        if device.type == "cpu":
            # Private: a shared mapping would be charged to shared memory, which containers keep small.
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._mapping = mmap.mmap(-1, num_blocks * layout.block_bytes, flags=flags)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                # First touches cost 3 to 4 us a page on a virtual machine (measured), one a block and layer otherwise.
                _prefer_huge_pages(self._mapping)
            self.tensor: Tensor = torch.frombuffer(self._mapping, dtype=dtype).view(shape)
        else:
            self.tensor = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def address(self) -> int:
        """Of block 0; block i lies at address + i * block_bytes."""
        return self.tensor.data_ptr()

    @property
    def memory(self) -> memoryview:
        """The whole pool as writable bytes. Raises ValueError where the pool is not in the host's memory."""
        if self._mapping is None:
            raise ValueError("the pool is not in host memory")
        return memoryview(self._mapping)

    def copy_block(self, source: int, target: int) -> None:
        self.tensor[target].copy_(self.tensor[source])


def _prefer_huge_pages(mapping: mmap.mmap) -> None:
    with contextlib.suppress(OSError):  # a kernel without them; small pages serve as well
        mapping.madvise(mmap.MADV_HUGEPAGE)

"""KVCache: one page-aligned allocation of blocks, readable by others at an address."""

import mmap

import torch
from torch import Tensor

from tailrace.host_memory import FirstTouch, map_memory
from tailrace.kv.layout import KVLayout


class KVCache:
    """`num_blocks` blocks of a layout. On a CPU pages come zeroed, and only when they are first touched: by a step that
    writes there, or by `touch_more` before.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device) -> None:
        self.num_blocks = num_blocks
        self.block_bytes = layout.block_bytes
        self._mapping: mmap.mmap | None = None
        self._touch: FirstTouch | None = None
        dtype: torch.dtype = getattr(torch, layout.kv_dtype)
        shape = (num_blocks, *layout.block_shape)
        if device.type == "cpu":
            # In huge pages: first touches cost 3 to 4 us a page on a virtual machine (measured), and small pages would
            # take one a block and layer.
            self._mapping = map_memory(num_blocks * layout.block_bytes)
            self._touch = FirstTouch(self._mapping)
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

    def touch_more(self) -> bool:
        """Gives the next piece of the pool its memory, and leaves what it holds. False: there is nothing left to do."""
        return self._touch is not None and self._touch.more()

    def copy_block(self, source: int, target: int) -> None:
        self.tensor[target].copy_(self.tensor[source])

"""The memory of a block pool as the transports see it: addresses, bytes and generation stamps."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, eq=False)
class PoolMemory:
    """One pool, `num_blocks` blocks of `block_bytes` bytes without gaps, and one stamp a block.

    `stamps` is a contiguous uint64 array of `num_blocks` entries that the block pool writes and owners read. Both must
    stay where they are, and mapped, until the Owner and the Needer made from this object are closed.
    """

    address: int
    block_bytes: int
    num_blocks: int
    view: memoryview | None
    """Writable bytes of the whole pool; None where the CPU cannot reach it, which leaves only `nixl`."""
    stamps: npt.NDArray[np.uint64]
    memory: str = "dram"
    device: int = 0

    def __post_init__(self) -> None:
        if self.block_bytes <= 0 or self.num_blocks <= 0:
            raise ValueError(f"a pool of {self.num_blocks} blocks of {self.block_bytes} bytes")
        if self.memory not in ("dram", "vram"):
            raise ValueError(f"memory: 'dram' or 'vram', not {self.memory!r}")
        if (
            self.stamps.dtype != np.uint64
            or self.stamps.shape != (self.num_blocks,)
            or not self.stamps.flags.c_contiguous
        ):
            raise ValueError(f"stamps: a contiguous uint64 array of {self.num_blocks} entries is needed")
        if self.view is not None and (self.view.nbytes != self.num_bytes or self.view.readonly):
            raise ValueError(f"view: {self.num_bytes} writable bytes are needed")

    @property
    def num_bytes(self) -> int:
        return self.block_bytes * self.num_blocks

    @property
    def stamps_address(self) -> int:
        return int(self.stamps.ctypes.data)

    def bytes_of(self, block: int, num_blocks: int = 1) -> memoryview:
        """The bytes of `num_blocks` blocks from `block` on. Raises ValueError where the pool has no CPU view."""
        if self.view is None:
            raise ValueError("this pool has no bytes that the CPU can reach")
        return self.view[block * self.block_bytes : (block + num_blocks) * self.block_bytes]


def address_of(view: memoryview) -> int:
    """Of the first byte of writable memory."""
    return int(np.frombuffer(view, dtype=np.uint8).ctypes.data)

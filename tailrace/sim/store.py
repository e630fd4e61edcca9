"""A node's store under virtual time: a tier in host memory, and one on NVMe that takes what falls out of it."""

from collections.abc import Sequence

from tailrace.index.prefix_index import PrefixIndex
from tailrace.policy.eviction import EvictionOrder
from tailrace.sim.prefill import EPOCH


class StoreTier:
    """Blocks by name, the least valuable evicted first."""

    def __init__(
        self, holder_id: str, num_blocks: int, order: EvictionOrder[bytes], lower: "StoreTier | None" = None
    ) -> None:
        """`lower` takes what is evicted here; None: it is lost."""
        self.holder_id = holder_id
        self._num_blocks = num_blocks
        self._order = order
        self._lower = lower

    def __len__(self) -> int:
        return len(self._order)

    def longest_prefix(self, hashes: Sequence[bytes]) -> int:
        return next((depth for depth, name in enumerate(hashes) if name not in self._order), len(hashes))

    def put(self, hashes: Sequence[bytes], index: PrefixIndex) -> None:
        """Blocks of one prompt, root first; those that are here already were used once more."""
        fresh = [name for name in hashes if name not in self._order]
        for name in reversed(hashes):
            self._order.add(name)
        fallen = [self._order.pop() for _ in range(len(self._order) - self._num_blocks)]
        index.publish(self.holder_id, EPOCH, fresh)
        index.retract(self.holder_id, EPOCH, fallen)
        if self._lower is not None and fallen:
            # The tail falls first: the root must be the last that the lower tier was told of.
            self._lower.put(fallen[::-1], index)

"""Pins: which blocks are never given up, and who wants that."""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from tailrace.kvstore.slots import StoredBlock

MAX_OWNERS = 256


@dataclass(frozen=True, slots=True)
class PinRefusal:
    """Why nothing was pinned. One of them is not 0."""

    num_missing: int = 0
    """Blocks that the store does not have."""
    num_beyond: int = 0
    """Blocks more than may be pinned."""
    num_owners: int = 0
    """Owners that there are already."""


class Pins:
    """A block stays pinned until each of its owners has let go of it. `KvStore` is the only writer."""

    def __init__(self, limit: int) -> None:
        """`limit`: different blocks at a time."""
        self.limit = limit
        self.num_blocks = 0
        """Different blocks that are pinned."""
        self._by_owner: dict[str, dict[bytes, StoredBlock]] = {}

    def owners(self) -> dict[str, int]:
        """Blocks pinned by each."""
        return {owner: len(pinned) for owner, pinned in self._by_owner.items()}

    def refusal(self, owner: str, blocks: Collection[StoredBlock]) -> PinRefusal | None:
        if owner not in self._by_owner and len(self._by_owner) >= MAX_OWNERS:
            return PinRefusal(num_owners=MAX_OWNERS)
        beyond = self.num_blocks + sum(1 for block in blocks if not block.num_pins) - self.limit
        return PinRefusal(num_beyond=beyond) if beyond > 0 else None

    def add(self, owner: str, blocks: Iterable[StoredBlock]) -> None:
        """An owner that pins a block twice has pinned it once."""
        pinned = self._by_owner.setdefault(owner, {})
        for block in blocks:
            if block.block_hash not in pinned:
                pinned[block.block_hash] = block
                self.num_blocks += not block.num_pins
                block.num_pins += 1
        self._drop_if_empty(owner)

    def remove(self, owner: str, names: Collection[bytes] | None) -> list[StoredBlock]:
        """Of those named, or of all, the blocks that this owner had pinned."""
        pinned = self._by_owner.get(owner, {})
        removed = [pinned.pop(name) for name in (list(pinned) if names is None else names) if name in pinned]
        for block in removed:
            block.num_pins -= 1
            self.num_blocks -= not block.num_pins
        self._drop_if_empty(owner)
        return removed

    def forget(self, block: StoredBlock) -> None:
        """It is gone, pinned or not: a disk may fail."""
        if block.num_pins:
            for owner in [name for name, pinned in self._by_owner.items() if block.block_hash in pinned]:
                self.remove(owner, [block.block_hash])

    def check_integrity(self, blocks: Iterable[StoredBlock]) -> None:
        """Raises AssertionError where the pins of all blocks of the store do not add up."""
        found = Counter(name for pinned in self._by_owner.values() for name in pinned)
        counted = {block.block_hash: block.num_pins for block in blocks if block.num_pins}
        if counted != dict(found) or len(counted) != self.num_blocks or not all(self._by_owner.values()):
            raise AssertionError(f"store: pins do not add up: {self.num_blocks} blocks")

    def _drop_if_empty(self, owner: str) -> None:
        if not self._by_owner.get(owner, True):
            del self._by_owner[owner]

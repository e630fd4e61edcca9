"""The prefix index in plain Python: where there is no C compiler, and what the compact one is compared with."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from tailrace.index.local import LocalIndex
from tailrace.index.prefix_index import IndexStats, PrefixHit, deepest_runs
from tailrace.kv.events import KVEvent, KVEventKind, Tier

_DEFAULT_MAX_BLOCKS = 1 << 20


@dataclass(slots=True)
class _Holder:
    max_blocks: int
    blocks: OrderedDict[bytes, Tier] = field(default_factory=OrderedDict)
    """The earliest published first."""


class MemoryIndex(LocalIndex):
    """Holders of each block as one bit a worker, so that a lookup is one step a block for all workers together.

    `max_blocks_per_worker` bounds memory: beyond it a worker's earliest published block is forgotten.
    """

    def __init__(self, max_blocks_per_worker: int = _DEFAULT_MAX_BLOCKS) -> None:
        super().__init__(max_blocks_per_worker)
        self._holders: dict[int, _Holder] = {}
        """By the holder's bit."""
        self._bits: dict[bytes, int] = {}
        """Of a block's holders."""
        self._num_forgotten = 0

    def __repr__(self) -> str:
        return f"<MemoryIndex {len(self._bits)} blocks: {self._held()}>"

    def stats(self) -> IndexStats:
        num_held = sum(len(holder.blocks) for holder in self._holders.values())
        return IndexStats(len(self._bits), num_held, 0, self._num_forgotten, 0, 0, self.num_lookups)

    # -- what is asked ------------------------------------------------------------------------------------------------

    def longest_prefix(self, hashes: Sequence[bytes]) -> dict[str, int]:
        self.num_lookups += 1
        depths: dict[str, int] = {}
        alive = sum(self._ids)
        for depth, block_hash in enumerate(hashes):
            holding = alive & self._bits.get(block_hash, 0)
            if holding != alive:
                self._note(depths, alive & ~holding, depth)
                alive = holding
                if not alive:
                    return depths
        self._note(depths, alive, len(hashes))
        return depths

    def _note(self, depths: dict[str, int], bits: int, depth: int) -> None:
        while bits and depth:
            bit = bits & -bits
            depths[self._ids[bit]] = depth
            bits ^= bit

    def longest_prefix_by_tier(self, hashes: Sequence[bytes]) -> dict[str, PrefixHit]:
        return {
            worker_id: self._hit(worker_id, hashes, depth) for worker_id, depth in self.longest_prefix(hashes).items()
        }

    def _hit(self, worker_id: str, hashes: Sequence[bytes], depth: int) -> PrefixHit:
        blocks = self._holders[self._workers[worker_id].holder].blocks
        by_tier = [0] * len(Tier)
        for block_hash in islice(hashes, depth):
            by_tier[blocks[block_hash]] += 1
        return PrefixHit(depth, tuple(by_tier))

    def deepest_runs(self, hashes: Sequence[bytes], span: int) -> dict[str, PrefixHit]:
        self.num_lookups += 1
        held = [(self._ids[bit], holder.blocks) for bit, holder in self._holders.items()]
        return deepest_runs([{name: blocks[each] for name, blocks in held if each in blocks} for each in hashes], span)

    # -- the table ----------------------------------------------------------------------------------------------------

    def _admit(self, max_blocks: int) -> int:
        used = sum(self._ids)
        bit = ~used & (used + 1)
        self._holders[bit] = _Holder(max_blocks)
        return bit

    def _drop(self, holder: int) -> None:
        for block_hash in self._holders.pop(holder).blocks:
            self._unmark(block_hash, holder)

    def _count(self, holder: int) -> int:
        return len(self._holders[holder].blocks)

    def _change(self, holder: int, events: Sequence[KVEvent]) -> None:
        for event in events:
            if event.kind is KVEventKind.PUBLISH:
                self._publish(holder, (event.block_hash,), event.tier)
            else:
                self._retract(holder, (event.block_hash,))

    def _publish(self, holder: int, hashes: Iterable[bytes], tier: Tier) -> None:
        held = self._holders[holder]
        for block_hash in hashes:
            if block_hash not in held.blocks:
                if len(held.blocks) >= held.max_blocks:
                    self._num_forgotten += 1
                    self._unmark(held.blocks.popitem(last=False)[0], holder)
                self._bits[block_hash] = self._bits.get(block_hash, 0) | holder
            held.blocks[block_hash] = tier

    def _retract(self, holder: int, hashes: Iterable[bytes]) -> None:
        held = self._holders[holder]
        for block_hash in hashes:
            if held.blocks.pop(block_hash, None) is not None:
                self._unmark(block_hash, holder)

    def _unmark(self, block_hash: bytes, holder: int) -> None:
        if left := self._bits[block_hash] & ~holder:
            self._bits[block_hash] = left
        else:
            del self._bits[block_hash]

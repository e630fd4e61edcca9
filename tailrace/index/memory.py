"""The prefix index in one process's memory: which worker holds which blocks.

Entries are hints. Nothing here fails a request: what is missing costs a hit, what is stale is refused by the owner.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tailrace.kv.events import KVEvent, KVEventKind

FIRST_SEQUENCE = 0
"""Number of an epoch's first event."""
_DEFAULT_MAX_BLOCKS = 1 << 20


@dataclass(slots=True)
class _Worker:
    bit: int
    """1 << place: its mark in the holders of a block."""
    epoch: int
    next_sequence: int = FIRST_SEQUENCE
    max_blocks: int = _DEFAULT_MAX_BLOCKS
    blocks: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    """The earliest published first."""


class MemoryIndex:
    """Holders of each block as one bit a worker, so that a lookup is one step a block for all workers together.

    Epochs of a worker go up: a higher one replaces everything known of the worker, a lower one is ignored.
    `max_blocks_per_worker` bounds memory: beyond it a worker's earliest published block is forgotten.
    """

    def __init__(self, max_blocks_per_worker: int = _DEFAULT_MAX_BLOCKS) -> None:
        if max_blocks_per_worker < 1:
            raise ValueError(f"max_blocks_per_worker must be at least 1, not {max_blocks_per_worker}")
        self._max_blocks = max_blocks_per_worker
        self._workers: dict[str, _Worker] = {}
        self._ids: dict[int, str] = {}
        self._holders: dict[bytes, int] = {}

    def __repr__(self) -> str:
        held = ", ".join(
            f"{worker_id}@{worker.epoch}={len(worker.blocks)}" for worker_id, worker in self._workers.items()
        )
        return f"<MemoryIndex {len(self._holders)} blocks: {held}>"

    def num_blocks(self, worker_id: str) -> int:
        worker = self._workers.get(worker_id)
        return len(worker.blocks) if worker else 0

    # -- what is asked ------------------------------------------------------------------------------------------------

    def longest_prefix(self, hashes: Sequence[bytes]) -> dict[str, int]:
        """Leading blocks of `hashes` that each worker holds; workers that hold none are not named."""
        depths: dict[str, int] = {}
        alive = sum(self._ids)
        for depth, block_hash in enumerate(hashes):
            holding = alive & self._holders.get(block_hash, 0)
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

    # -- what workers tell --------------------------------------------------------------------------------------------

    def apply(self, worker_id: str, epoch: int, first_sequence: int, events: Sequence[KVEvent]) -> bool:
        """Applies events numbered from `first_sequence`; those already applied are skipped, an old epoch is ignored.

        False, and nothing changed, when events are missing before these: fetch a snapshot and call `reset`.
        """
        known = self._workers.get(worker_id)
        if known is not None and epoch < known.epoch:
            return True
        expected = known.next_sequence if known is not None and epoch == known.epoch else FIRST_SEQUENCE
        if first_sequence > expected:
            return False
        worker = self._current(worker_id, epoch)
        for event in events[expected - first_sequence :]:
            if event.kind is KVEventKind.PUBLISH:
                self._add(worker, event.block_hash)
            else:
                self._remove(worker, event.block_hash)
        worker.next_sequence = max(expected, first_sequence + len(events))
        return True

    def reset(
        self, worker_id: str, epoch: int, hashes: Iterable[bytes], next_sequence: int, *, max_blocks: int | None = None
    ) -> None:
        """Replaces all that is known of a worker by a snapshot, after which its event `next_sequence` comes next.

        `max_blocks`: the size of the worker's pool, where known; it can only lower the index's own limit.
        """
        known = self._workers.get(worker_id)
        if known is not None and epoch < known.epoch:
            return
        self.drop_worker(worker_id)
        worker = self._current(worker_id, epoch)
        worker.next_sequence = next_sequence
        if max_blocks is not None:
            worker.max_blocks = max(1, min(max_blocks, self._max_blocks))
        elif known is not None and known.epoch == epoch:
            worker.max_blocks = known.max_blocks
        for block_hash in hashes:
            self._add(worker, block_hash)

    def publish(self, worker_id: str, epoch: int, hashes: Iterable[bytes]) -> None:
        """The worker holds these blocks, outside any numbering; an old epoch is ignored."""
        worker = self._current(worker_id, epoch)
        if worker.epoch == epoch:
            for block_hash in hashes:
                self._add(worker, block_hash)

    def retract(self, worker_id: str, epoch: int, hashes: Iterable[bytes]) -> None:
        """The worker no longer holds these blocks; an old epoch is ignored."""
        worker = self._current(worker_id, epoch)
        if worker.epoch == epoch:
            for block_hash in hashes:
                self._remove(worker, block_hash)

    def drop_worker(self, worker_id: str) -> None:
        """Forgets a worker; one that is not known is no error."""
        worker = self._workers.pop(worker_id, None)
        if worker is None:
            return
        for block_hash in list(worker.blocks):
            self._remove(worker, block_hash)
        del self._ids[worker.bit]

    # -- inside -------------------------------------------------------------------------------------------------------

    def _current(self, worker_id: str, epoch: int) -> _Worker:
        """The worker's record, begun anew for a higher epoch; a lower one gets the record of the newer epoch."""
        known = self._workers.get(worker_id)
        if known is not None and known.epoch >= epoch:
            return known
        self.drop_worker(worker_id)
        worker = _Worker(self._unused_bit(), epoch, max_blocks=self._max_blocks)
        self._workers[worker_id] = worker
        self._ids[worker.bit] = worker_id
        return worker

    def _unused_bit(self) -> int:
        used = sum(self._ids)
        return ~used & (used + 1)

    def _add(self, worker: _Worker, block_hash: bytes) -> None:
        if block_hash in worker.blocks:
            return
        if len(worker.blocks) >= worker.max_blocks:
            self._remove(worker, next(iter(worker.blocks)))
        worker.blocks[block_hash] = None
        self._holders[block_hash] = self._holders.get(block_hash, 0) | worker.bit

    def _remove(self, worker: _Worker, block_hash: bytes) -> None:
        if block_hash not in worker.blocks:
            return
        del worker.blocks[block_hash]
        left = self._holders[block_hash] & ~worker.bit
        if left:
            self._holders[block_hash] = left
        else:
            del self._holders[block_hash]

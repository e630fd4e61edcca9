"""What the indexes in one process's memory have in common: the epochs of workers, and the numbers of their events."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tailrace.index.prefix_index import FIRST_SEQUENCE, IndexStats, PrefixHit
from tailrace.kv.events import KVEvent, Tier


@dataclass(slots=True)
class _Worker:
    holder: int
    """Its name in the table below, until it is dropped or reset."""
    epoch: int
    next_sequence: int
    max_blocks: int


class LocalIndex(ABC):
    """A PrefixIndex over a table of holders, which knows neither epochs nor numbers."""

    def __init__(self, max_blocks_per_worker: int) -> None:
        if max_blocks_per_worker < 1:
            raise ValueError(f"max_blocks_per_worker must be at least 1, not {max_blocks_per_worker}")
        self._max_blocks = max_blocks_per_worker
        self._workers: dict[str, _Worker] = {}
        self._ids: dict[int, str] = {}
        """Worker ids by holder."""
        self.num_lookups = 0

    def _held(self) -> str:
        return ", ".join(f"{name}@{worker.epoch}={self.num_blocks(name)}" for name, worker in self._workers.items())

    def num_blocks(self, worker_id: str) -> int:
        worker = self._workers.get(worker_id)
        return self._count(worker.holder) if worker else 0

    @abstractmethod
    def stats(self) -> IndexStats: ...

    @abstractmethod
    def longest_prefix(self, hashes: Sequence[bytes]) -> dict[str, int]: ...

    @abstractmethod
    def longest_prefix_by_tier(self, hashes: Sequence[bytes]) -> dict[str, PrefixHit]: ...

    @abstractmethod
    def deepest_runs(self, hashes: Sequence[bytes], span: int) -> dict[str, PrefixHit]: ...

    # -- what workers tell: as PrefixIndex says -----------------------------------------------------------------------

    def apply(self, worker_id: str, epoch: int, first_sequence: int, events: Sequence[KVEvent]) -> bool:
        known = self._workers.get(worker_id)
        if known is not None and epoch < known.epoch:
            return True
        expected = known.next_sequence if known is not None and epoch == known.epoch else FIRST_SEQUENCE
        if first_sequence > expected:
            return False
        worker = self._current(worker_id, epoch)
        if (num_applied := expected - first_sequence) < len(events):
            self._change(worker.holder, events[num_applied:] if num_applied else events)
            worker.next_sequence = first_sequence + len(events)
        return True

    def reset(
        self, worker_id: str, epoch: int, hashes: Iterable[bytes], next_sequence: int, *, max_blocks: int | None = None
    ) -> None:
        known = self._workers.get(worker_id)
        if known is not None and epoch < known.epoch:
            return
        limit = self._max_blocks
        if max_blocks is not None:
            limit = max(1, min(max_blocks, limit))
        elif known is not None and known.epoch == epoch:
            limit = known.max_blocks
        self.drop_worker(worker_id)
        worker = self._enter(worker_id, epoch, limit)
        worker.next_sequence = next_sequence
        self._publish(worker.holder, hashes, Tier.WORKER)

    def publish(self, worker_id: str, epoch: int, hashes: Iterable[bytes], tier: Tier = Tier.WORKER) -> None:
        worker = self._current(worker_id, epoch)
        if worker.epoch == epoch:
            self._publish(worker.holder, hashes, tier)

    def retract(self, worker_id: str, epoch: int, hashes: Iterable[bytes]) -> None:
        worker = self._current(worker_id, epoch)
        if worker.epoch == epoch:
            self._retract(worker.holder, hashes)

    def drop_worker(self, worker_id: str) -> None:
        if (worker := self._workers.pop(worker_id, None)) is not None:
            del self._ids[worker.holder]
            self._drop(worker.holder)

    def _current(self, worker_id: str, epoch: int) -> _Worker:
        """The worker's record, begun anew for a higher epoch; a lower one gets the record of the newer epoch."""
        known = self._workers.get(worker_id)
        if known is not None and known.epoch >= epoch:
            return known
        self.drop_worker(worker_id)
        return self._enter(worker_id, epoch, self._max_blocks)

    def _enter(self, worker_id: str, epoch: int, max_blocks: int) -> _Worker:
        worker = _Worker(self._admit(max_blocks), epoch, FIRST_SEQUENCE, max_blocks)
        self._workers[worker_id] = worker
        self._ids[worker.holder] = worker_id
        return worker

    # -- the table ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def _admit(self, max_blocks: int) -> int:
        """A holder of nothing."""

    @abstractmethod
    def _drop(self, holder: int) -> None:
        """From here on it holds nothing, and its number may be another's."""

    @abstractmethod
    def _count(self, holder: int) -> int: ...

    @abstractmethod
    def _change(self, holder: int, events: Sequence[KVEvent]) -> None: ...

    @abstractmethod
    def _publish(self, holder: int, hashes: Iterable[bytes], tier: Tier) -> None: ...

    @abstractmethod
    def _retract(self, holder: int, hashes: Iterable[bytes]) -> None: ...

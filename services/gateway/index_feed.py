"""Keeps the prefix index true to what one worker says of its cache."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

from tailrace.index.prefix_index import PrefixIndex
from tailrace.kv.events import KVEvents, Tier
from tailrace.messages import KvEventBatch, WorkerInfo

log = logging.getLogger(__name__)

POOLS_HELD = 2
"""A worker's limit. Events replayed over a later snapshot add what the worker has dropped since: a pool at most."""


class IndexFeed:
    """From a snapshot to the events that come after it. Event loop only.

    Events that come while a snapshot travels wait for it: dropped, they would be the next gap, and a busy worker would
    be asked for snapshots without end.
    """

    def __init__(
        self, info: WorkerInfo, index: PrefixIndex, snapshot: Callable[[], AsyncIterator[KvEventBatch]]
    ) -> None:
        self._info = info
        self._index = index
        self._snapshot = snapshot
        self._waiting: list[KvEventBatch] = []
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """The worker is known from here on, as holding nothing until its snapshot has come."""
        self._reset(0)
        self._resync()

    def take(self, batch: KvEventBatch) -> None:
        if self._task is not None:
            self._waiting.append(batch)
        elif not self._apply(batch):
            log.info("events of %s are missing; asking for all it has", self._info.worker_id)
            self._waiting.append(batch)
            self._resync()

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._index.drop_worker(self._info.worker_id)

    def _apply(self, batch: KvEventBatch) -> bool:
        return self._index.apply(self._info.worker_id, self._info.epoch, batch.first_sequence, batch.events)

    def _reset(self, next_sequence: int) -> None:
        most = POOLS_HELD * self._info.num_blocks or None
        self._index.reset(self._info.worker_id, self._info.epoch, [], next_sequence, max_blocks=most)

    def _resync(self) -> None:
        self._task = asyncio.create_task(self._fetch(), name=f"snapshot {self._info.worker_id}")
        self._task.add_done_callback(self._fetched)

    async def _fetch(self) -> None:
        """The index changes only once the whole snapshot is here, and then piece by piece: others have their turn."""
        pieces: list[KVEvents] = []
        sequence = 0
        async for batch in self._snapshot():
            pieces.append(batch.events)
            sequence = batch.first_sequence
        self._reset(sequence)
        for piece in pieces:
            for tier in Tier:
                if hashes := piece.published_on(tier):
                    self._index.publish(self._info.worker_id, self._info.epoch, hashes, tier)
            await asyncio.sleep(0)

    def _fetched(self, task: "asyncio.Task[None]") -> None:
        """Without the snapshot the next event is a gap, and asks again."""
        if task.cancelled():
            return
        self._task = None
        waiting, self._waiting = self._waiting, []
        if (error := task.exception()) is not None:
            log.warning("%s failed: %s", task.get_name(), error)
            return
        for batch in waiting:
            self.take(batch)

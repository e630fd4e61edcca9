"""Keeps a prefix index true to what each worker says of its cache, whoever brings the news.

News of one worker may come over its own stream and through Redis, in any mixture: events are numbered within an epoch,
so what is known already is skipped, and what is missing is noticed.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from tailrace.index.backoff import Backoff
from tailrace.index.prefix_index import IndexStats, PrefixIndex
from tailrace.index.trouble import RedisTroubleError
from tailrace.kv.events import KVEvents, Tier
from tailrace.messages import KvEventBatch

log = logging.getLogger(__name__)

MAX_WAITING = 1 << 16
"""Events kept while a snapshot travels; more of them begin another one."""
MAX_SNAPSHOTS = 16
"""Travelling at once."""
POOLS_HELD = 2
"""A worker's limit. Events replayed over a later snapshot add what the worker has dropped since: a pool at most."""

Snapshot = Callable[[], AsyncIterator[KvEventBatch]]
Missed = Callable[[int], Awaitable[Sequence[KvEventBatch]]]
"""Events from this number on, in order, from somewhere that still has them; none where it has not."""


class Source(StrEnum):
    """Who says that a worker is there."""

    ATTACH = "attach"
    REDIS = "redis"


@dataclass(frozen=True, slots=True)
class Holder:
    """One life of a worker, as a holder of blocks."""

    worker_id: str
    epoch: int
    num_blocks: int
    """Of its pool; 0: not known."""


class Feed:
    """One life of one worker, from a snapshot to the events that come after it. Event loop only.

    Events that come while a snapshot travels wait for it: dropped, they would be the next gap, and a busy worker would
    be asked for snapshots without end. A gap is closed with the events themselves where `missed` still has them.
    """

    def __init__(self, holder: Holder, index: PrefixIndex, snapshot: Snapshot, feeds: "Feeds") -> None:
        self.worker_id, self.epoch = holder.worker_id, holder.epoch
        self._max_blocks = POOLS_HELD * holder.num_blocks or None
        self.sources: set[Source] = set()
        self.next_sequence = 0
        """Events below are in the index."""
        self.missed: Missed | None = None
        self._is_whole = False
        """A snapshot has come: what lacks is what came after it."""
        self._index, self._snapshot, self._feeds = index, snapshot, feeds
        self._waiting: list[KvEventBatch] = []
        self._num_waiting = 0
        self._task: asyncio.Task[None] | None = None
        self._backoff = Backoff()
        self._asks_again_at = 0.0

    def open(self) -> None:
        """The worker is known from here on, as holding nothing until its snapshot has come."""
        self._reset(0)
        self._resync(0)

    def knows(self, first_sequence: int, num_events: int) -> bool:
        return first_sequence + num_events <= self.next_sequence

    def take(self, batch: KvEventBatch) -> None:
        if self._task is not None:
            self._wait(batch)
        elif not self.knows(batch.first_sequence, len(batch.events)) and not self._apply(batch):
            self._wait(batch)
            self._resync(batch.first_sequence)

    def expect(self, sequence: int) -> None:
        """The worker has said this much by now: whoever does not know it has missed something."""
        if self._task is None and sequence > self.next_sequence and time.monotonic() >= self._asks_again_at:
            self._resync(sequence)

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _wait(self, batch: KvEventBatch) -> None:
        self._num_waiting += len(batch.events)
        if self._num_waiting > MAX_WAITING:
            self._waiting, self._num_waiting = [], len(batch.events)
        self._waiting.append(batch)

    def _apply(self, batch: KvEventBatch) -> bool:
        if not self._index.apply(self.worker_id, self.epoch, batch.first_sequence, batch.events):
            return False
        self.next_sequence = max(self.next_sequence, batch.first_sequence + len(batch.events))
        return True

    def _resync(self, sequence: int) -> None:
        """Events up to this number are missing."""
        self._task = asyncio.create_task(self._fill(sequence), name=f"snapshot {self.worker_id}")
        self._task.add_done_callback(self._fetched)

    async def _fill(self, sequence: int) -> None:
        async with self._feeds.fetching:
            if await self._catch_up(sequence):
                self._feeds.num_replays += 1
                return
            if self._is_whole:
                log.info("events of %s are missing; asking for all it has", self.worker_id)
            self._feeds.num_snapshots += 1
            await self._fetch()
            self._is_whole = True

    async def _catch_up(self, sequence: int) -> bool:
        if self.missed is None or not self._is_whole:
            return False
        try:
            batches = await self.missed(self.next_sequence)
        except RedisTroubleError as error:
            log.debug("events of %s: %s", self.worker_id, error)
            return False
        return all(self._apply(batch) for batch in batches) and self.next_sequence >= sequence

    def _reset(self, next_sequence: int) -> None:
        self._index.reset(self.worker_id, self.epoch, [], next_sequence, max_blocks=self._max_blocks)
        self.next_sequence = next_sequence

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
                    self._index.publish(self.worker_id, self.epoch, hashes, tier)
            await asyncio.sleep(0)

    def _fetched(self, task: "asyncio.Task[None]") -> None:
        """Without the snapshot the next event is a gap, and asks again."""
        if task.cancelled():
            return
        self._task = None
        waiting, self._waiting, self._num_waiting = self._waiting, [], 0
        if (error := task.exception()) is not None:
            log.warning("%s failed: %s", task.get_name(), error)
            self._asks_again_at = time.monotonic() + self._backoff.next_s()
            return
        self._backoff.reset()
        for batch in waiting:
            self.take(batch)


class Feeds:
    """The feeds of all workers, by worker id. Event loop only."""

    def __init__(self, index: PrefixIndex) -> None:
        self._index = index
        self._feeds: dict[str, Feed] = {}
        self.fetching = asyncio.Semaphore(MAX_SNAPSHOTS)
        self.num_snapshots = 0
        """Asked for so far: one when a worker is first seen, and one a gap that nothing else could close."""
        self.num_replays = 0
        """Gaps closed with the events that were missing."""

    def stats(self) -> IndexStats:
        """Of the index that is fed."""
        return self._index.stats()

    def get(self, worker_id: str) -> Feed | None:
        return self._feeds.get(worker_id)

    def hold(self, holder: Holder, source: Source, snapshot: Snapshot) -> Feed:
        """The worker's feed, which lives until every source has released it.

        A new life ends the feed of the old one. An old life gets a feed that changes nothing.
        """
        feed = self._feeds.get(holder.worker_id)
        if feed is None or feed.epoch < holder.epoch:
            if feed is not None:
                feed.stop()
            feed = self._feeds[holder.worker_id] = Feed(holder, self._index, snapshot, self)
            feed.open()
        elif feed.epoch > holder.epoch:
            feed = Feed(holder, self._index, snapshot, self)
        feed.sources.add(source)
        return feed

    def release(self, feed: Feed, source: Source) -> None:
        """Idempotent."""
        feed.sources.discard(source)
        if feed.sources:
            return
        feed.stop()
        if self._feeds.get(feed.worker_id) is feed:
            del self._feeds[feed.worker_id]
            self._index.drop_worker(feed.worker_id)

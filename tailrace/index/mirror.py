"""What Redis knows of the workers, kept in this process: the registry once a second, events as they come.

Routing never waits for Redis. When it is away, slow, read-only or another version's, what is known stays, the trouble
has a name, and it is tried again until the streams can be followed. What was missed meanwhile is read from them where
they still have it; else it comes as a snapshot, from the worker itself.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from tailrace.index.backoff import Backoff, keep_trying, until_one_fails
from tailrace.index.feeds import Feed, Feeds, Holder, Snapshot, Source
from tailrace.index.keys import KeySpace, StreamMessage
from tailrace.index.redis_client import BLOCK_SHARE, RedisClient
from tailrace.index.registry import TTL_S, Registration, Registry, check_version
from tailrace.index.streams import id_of, read_messages, read_streams, stream_end
from tailrace.index.trouble import RedisTroubleError
from tailrace.messages import KvEventBatch

log = logging.getLogger(__name__)

VISIT_S = 1.0
MAX_READ = 256
"""Messages of one answer; the event loop has its turn between two."""
REPLAY_PAGE, REPLAY_PAGES = 32, 4
"""Of a stream's newest messages, looked through for missing events: 1.2 MB, as a snapshot of 64k blocks."""


class Mirror:
    """Fills `feeds` for as long as `run` runs. Event loop only."""

    def __init__(
        self,
        client: RedisClient,
        keys: KeySpace,
        registry: Registry,
        feeds: Feeds,
        *,
        gateway_id: str,
        model_digest: str,
        snapshot: Callable[[Registration], Snapshot],
        seen: Callable[[Mapping[str, Registration]], None] = lambda workers: None,
    ) -> None:
        """`seen` hears of all registered workers of this model, again at each visit to Redis that went well."""
        self._client, self._keys, self._registry, self._feeds = client, keys, registry, feeds
        self._gateway_id, self._model_digest = gateway_id, model_digest
        self._snapshot, self._seen = snapshot, seen
        self._held: dict[str, Feed] = {}
        self._last_seen_at: dict[str, float] = {}
        self._sequences: dict[str, int] = {}
        self._cursors: dict[bytes, bytes] = {}
        self._trouble_since = time.monotonic()
        self.trouble = f"Redis at {client.url.address}: not connected yet"
        """Empty: all is well."""
        self.num_troubles = 0
        self.num_garbage = 0
        """Messages that no worker wrote."""

    @property
    def num_registered(self) -> int:
        return len(self._sequences)

    async def run(self) -> None:
        """Until it is cancelled."""
        try:
            await keep_trying(self._client, self._session, self._note, "following Redis")
        finally:
            await self._client.close()

    async def _session(self, backoff: Backoff) -> None:
        await self._client.open()
        await check_version(self._client, self._keys)
        self._cursors = {stream: await self._cursor(stream) for stream in self._keys.streams}
        await self._visit()
        self._note_well()
        backoff.reset()
        streams = self._keys.streams
        groups = [[stream] for stream in streams] if self._client.is_cluster else [streams]
        await until_one_fails([self._keep_visiting(), *map(self._follow, groups)])

    async def _cursor(self, stream: bytes) -> bytes:
        """Where to read on: what was told meanwhile is still there, or is noticed as a gap.

        The first time, from the end on: what was before is in the snapshots that follow. A stream that ends before what
        was read of it is another one, of a Redis that was restarted or has failed over.
        """
        end = await stream_end(self._client, stream)
        if (cursor := self._cursors.get(stream)) is None:
            return end
        return cursor if id_of(cursor) <= id_of(end) else b"0"

    # -- trouble ------------------------------------------------------------------------------------------------------

    def _note(self, error: RedisTroubleError) -> None:
        if not self.trouble:
            self._trouble_since = time.monotonic()
            self.num_troubles += 1
        if self.trouble != error.message:
            log.warning("%s; routing goes on from what is known", error.message)
        self.trouble = error.message

    def _note_well(self) -> None:
        if self.trouble:
            spent_s = time.monotonic() - self._trouble_since
            log.info("Redis at %s is followed, after %.1f s without it", self._client.url.address, spent_s)
        self.trouble = ""

    # -- the registry -------------------------------------------------------------------------------------------------

    async def _keep_visiting(self) -> None:
        while True:
            await asyncio.sleep(VISIT_S)
            await self._visit()

    async def _visit(self) -> None:
        await self._registry.visit(self._gateway_id)
        ours = {name: worker for name, worker in self._registry.workers.items() if self._is_ours(worker)}
        now = time.monotonic()
        for name, worker in ours.items():
            self._last_seen_at[name] = now
            self._settle(worker)
        for name in [name for name, seen_at in self._last_seen_at.items() if now - seen_at > TTL_S]:
            self._forget(name)
        self._seen(ours)

    def _is_ours(self, worker: Registration) -> bool:
        return not self._model_digest or worker.model_digest in ("", self._model_digest)

    def _settle(self, worker: Registration) -> None:
        name = worker.worker_id
        held = self._held.get(name)
        holder = Holder(name, worker.epoch, worker.num_blocks)
        feed = self._feeds.hold(holder, Source.REDIS, self._snapshot(worker))
        if held is not feed:
            if held is not None:
                self._release(held)
            feed.missed = partial(self._missed, name, worker.epoch)
            self._held[name] = feed
        elif name in self._sequences:
            # What it had told by the last visit has been in the streams for a second.
            feed.expect(self._sequences[name])
        self._sequences[name] = worker.sequence

    def _forget(self, name: str) -> None:
        """Not at once: a Redis that has lost its keys gets them back from the workers within seconds."""
        del self._last_seen_at[name]
        self._sequences.pop(name, None)
        if (feed := self._held.pop(name, None)) is not None:
            self._release(feed)

    def _release(self, feed: Feed) -> None:
        feed.missed = None
        self._feeds.release(feed, Source.REDIS)

    # -- the streams --------------------------------------------------------------------------------------------------

    async def _follow(self, streams: Sequence[bytes]) -> None:
        while True:
            cursors = [self._cursors[stream] for stream in streams]
            limits = ("COUNT", MAX_READ, "BLOCK", int(self._client.timeout_s * BLOCK_SHARE * 1000))
            for stream, messages in read_streams(
                await self._client.one("XREAD", *limits, "STREAMS", *streams, *cursors)
            ):
                for message_id, fields in read_messages(messages):
                    self._cursors[stream] = message_id
                    self._take(fields)
            await asyncio.sleep(0)

    async def _missed(self, worker_id: str, epoch: int, sequence: int) -> list[KvEventBatch]:
        """The worker's events from `sequence` on, where its stream still has them. Raises RedisTroubleError."""
        stream, end = self._keys.stream_of(worker_id), b"+"
        found: list[KvEventBatch] = []
        for _ in range(REPLAY_PAGES):
            answer = await self._client.one("XREVRANGE", stream, end, "-", "COUNT", REPLAY_PAGE)
            page = list(read_messages(answer))
            for message_id, fields in page:
                end = b"(" + message_id
                message = self._read(fields)
                if message is None or message.worker_id != worker_id:
                    continue
                if message.batch.epoch != epoch:
                    return []
                found.append(message.batch)
                if message.batch.first_sequence <= sequence:
                    return found[::-1]
            if len(page) < REPLAY_PAGE:
                break
        return []

    def _take(self, fields: Mapping[object, object]) -> None:
        if (message := self._read(fields)) is None:
            return
        feed = self._held.get(message.worker_id)
        if feed is not None and feed.epoch == message.batch.epoch:
            feed.take(message.batch)

    def _read(self, fields: Mapping[object, object]) -> StreamMessage | None:
        try:
            return StreamMessage.read(fields)
        except ValueError as error:
            self.num_garbage += 1
            if self.num_garbage == 1:
                log.warning(
                    "Redis at %s: a stream of ours holds what no worker wrote: %s", self._client.url.address, error
                )
            return None

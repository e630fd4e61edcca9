"""A worker's own voice in Redis: its registration, its entries, its events. One writer a worker, and no waiting for it.

Everything is told again in time: the registration every BEAT_S, each entry three times within its life. So a Redis
that was away, or has lost its keys, is made whole by what runs anyway. While it is away, events wait, up to
MAX_PENDING; when more come they are given up, and the worker begins another edition, which voids what it can no longer
retract.
"""

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

from tailrace.index.backoff import Backoff, keep_trying
from tailrace.index.keys import MAX_EVENTS, MAX_MESSAGES, KeySpace, StreamMessage
from tailrace.index.redis import ENTRY_TTL_S, RedisIndex
from tailrace.index.redis_client import Command, RedisClient, ScriptCall
from tailrace.index.registry import BEAT_S, Registration, Registry, Standing, check_version
from tailrace.index.trouble import RedisTroubleError
from tailrace.kv.events import KVEventKind, KVEvents, Tier
from tailrace.messages import KvEventBatch

log = logging.getLogger(__name__)

MAX_PENDING = 1 << 16
"""Events that wait for Redis."""
MAX_FLUSH = 4096
"""Events of one flush."""
COALESCE_S = 0.02
"""News waits so long for company."""
HURRY_BLOCKS = 1024
"""Blocks told again with one flush while Redis lacks them."""
REPEATS = 3
"""How often each block is told within the life of its entry."""
LEAVE_S = 1.0


class Publisher:
    """Event loop only. `run` runs until it is cancelled."""

    def __init__(
        self,
        client: RedisClient,
        keys: KeySpace,
        secret: bytes,
        registration: Registration,
        *,
        cached: Callable[[], Awaitable[KVEvents]],
    ) -> None:
        """`cached`: publications of all that the worker holds; what happens to it afterwards must be offered."""
        self._client, self._keys, self._cached = client, keys, cached
        self._registry = Registry(client, keys, secret)
        self._index = RedisIndex(client, keys, self._registry)
        self.registration = registration
        self._pending = KVEvents()
        self._num_losses = 0
        """How often pending events were given up."""
        self._untold: dict[bytes, Tier] = {}
        """Blocks to be told again."""
        self._is_in_hurry = False
        self._told_again_at = -math.inf
        self._beat_at = 0.0
        self._news = asyncio.Event()
        self.trouble = f"Redis at {client.url.address}: not connected yet"

    def offer(self, batch: KvEventBatch) -> None:
        """Takes events in the order of their sequence numbers. Never blocks, never raises."""
        if len(self._pending) + len(batch.events) > MAX_PENDING:
            self._give_up()
        if not self._pending:
            self.registration = replace(self.registration, sequence=batch.first_sequence)
        self._pending = self._pending + batch.events
        self._forget_news(batch.events)
        self._news.set()

    def _forget_news(self, events: KVEvents) -> None:
        """What is news is told as such: told again, it would be told with the tier that it was on before."""
        if self._untold:
            for event in events:
                self._untold.pop(event.block_hash, None)

    def _give_up(self) -> None:
        told = self.registration
        self.registration = replace(told, edition=told.edition + 1, sequence=told.sequence + len(self._pending))
        self._pending = KVEvents()
        self._num_losses += 1
        self._told_again_at = -math.inf

    # -- life ---------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        try:
            await keep_trying(self._client, self._session, self._note, "telling Redis")
        finally:
            await self._leave()

    async def _session(self, backoff: Backoff) -> None:
        await self._client.open()
        await check_version(self._client, self._keys)
        self._beat_at = 0.0
        while True:
            await self._flush()
            self._note_well()
            backoff.reset()
            await self._wait()

    async def _wait(self) -> None:
        """For news, or until the next beat is due."""
        if self._is_in_hurry or len(self._pending) >= MAX_FLUSH:
            await asyncio.sleep(0)
            return
        try:
            async with asyncio.timeout(max(0.0, self._beat_at - time.monotonic())):
                await self._news.wait()
                await asyncio.sleep(COALESCE_S)
        except TimeoutError:
            pass

    async def _leave(self) -> None:
        """So that others need not wait for the registration to run out; without Redis they must."""
        try:
            async with asyncio.timeout(LEAVE_S):
                await self._registry.leave(self.registration)
        except (RedisTroubleError, TimeoutError) as error:
            log.debug("not struck off: %s", error)
        finally:
            await self._client.close()

    def _note(self, error: RedisTroubleError) -> None:
        if self.trouble != error.message:
            log.warning("%s; this worker serves on, and tells Redis of its blocks when it can", error.message)
        self.trouble = error.message

    def _note_well(self) -> None:
        if self.trouble:
            log.info("registered in Redis at %s", self._client.url.address)
        self.trouble = ""

    # -- telling ------------------------------------------------------------------------------------------------------

    async def _flush(self) -> None:
        """One round trip: the beat if it is due, news, and some of what must be told again."""
        is_beat = time.monotonic() >= self._beat_at
        has_begun = is_beat and await self._tell_all_again()
        self._news.clear()
        events, num_losses, told = self._pending[:MAX_FLUSH], self._num_losses, self.registration
        again = dict(itertools.islice(self._untold.items(), self._num_again(is_beat=is_beat)))
        news = replace(told, sequence=told.sequence + len(events))
        beat = self._registry.beat_commands(news) if is_beat else []
        # Blocks told again first: what became of them since then is among the events.
        commands = [*self._publish_commands(told, again), *self._event_commands(told, events)]
        answers = await self._client.all([*commands, *beat])
        if num_losses == self._num_losses:
            self._pending = self._pending[len(events) :]
            self.registration = replace(self.registration, sequence=news.sequence)
            for block_hash in again:
                self._untold.pop(block_hash, None)
        self._is_in_hurry = self._is_in_hurry and bool(self._untold)
        if is_beat:
            self._beat_at = time.monotonic() + BEAT_S
            if self._registry.standing(news, answers[len(commands) :]) is Standing.NEW and not has_begun:
                log.info(
                    "Redis at %s does not know this worker any more; it is told all again", self._client.url.address
                )
                self._told_again_at = -math.inf
                self._beat_at = 0.0

    def _num_again(self, *, is_beat: bool) -> int:
        if self._is_in_hurry:
            return HURRY_BLOCKS
        beats_left = max(1.0, (self._told_again_at + ENTRY_TTL_S / REPEATS - time.monotonic()) / BEAT_S)
        return math.ceil(len(self._untold) / beats_left) if is_beat else 0

    async def _tell_all_again(self) -> bool:
        """Begin another round where one is due: in a hurry if Redis has nothing of it, else spread over its time."""
        now = time.monotonic()
        if now - self._told_again_at < ENTRY_TTL_S / REPEATS:
            return False
        self._is_in_hurry = self._told_again_at == -math.inf
        self._told_again_at = now
        num_before = len(self._pending)
        self._untold = {event.block_hash: event.tier for event in await self._cached()}
        # What changed while the worker answered may be in its answer as it was before.
        self._forget_news(self._pending[num_before:])
        return True

    def _event_commands(self, told: Registration, events: KVEvents) -> list[Command | ScriptCall]:
        last = {event.block_hash: event for event in events}
        published = {hash_: event.tier for hash_, event in last.items() if event.kind is KVEventKind.PUBLISH}
        retracted = [hash_ for hash_, event in last.items() if event.kind is KVEventKind.RETRACT]
        return [
            *self._publish_commands(told, published),
            *self._index.retract_commands(told.life, retracted),
            *self._stream_commands(told, events),
        ]

    def _publish_commands(self, told: Registration, blocks: Mapping[bytes, Tier]) -> list[Command | ScriptCall]:
        commands: list[Command | ScriptCall] = []
        for tier in Tier:
            if hashes := [block_hash for block_hash, held_on in blocks.items() if held_on is tier]:
                commands += self._index.publish_commands(told.life, hashes, tier)
        return commands

    def _stream_commands(self, told: Registration, events: KVEvents) -> list[Command]:
        stream = self._keys.stream_of(told.worker_id)
        commands: list[Command] = []
        for start in range(0, len(events), MAX_EVENTS):
            batch = KvEventBatch(told.epoch, told.sequence + start, events[start : start + MAX_EVENTS])
            fields = StreamMessage(told.worker_id, batch).fields()
            commands.append(("XADD", stream, "MAXLEN", "~", MAX_MESSAGES, "*", *fields))
        return commands

"""Workers and gateways without processes, which speak to a real Redis."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable

from tailrace.index.feeds import Feeds, Snapshot
from tailrace.index.keys import KeySpace
from tailrace.index.memory import MemoryIndex
from tailrace.index.mirror import Mirror
from tailrace.index.publisher import Publisher
from tailrace.index.redis_client import RedisClient
from tailrace.index.redis_url import RedisUrl
from tailrace.index.registry import Registration, Registry
from tailrace.kv.events import KVEvents
from tailrace.messages import KvEventBatch
from tests.helpers.waiting import in_background

SECRET = b"a secret of the tests"
DIGEST = "a model"
TIMEOUT_S = 0.4


class PlayedWorker:
    """Its cache, and its voice in Redis."""

    def __init__(self, url: str, worker_id: str = "w0", epoch: int = 1, *, digest: str = DIGEST) -> None:
        self.worker_id, self.epoch = worker_id, epoch
        self.cached: dict[bytes, None] = {}
        self.sequence = 0
        self.num_snapshots = 0
        said = Registration(worker_id, epoch, 0, "prefill", "127.0.0.1:1", digest, 10_000, 0)
        client = RedisClient(RedisUrl.parse(url), timeout_s=TIMEOUT_S)
        self.publisher = Publisher(client, KeySpace("tailrace"), SECRET, said, cached=self._all)

    async def _all(self) -> KVEvents:
        return KVEvents.published(list(self.cached))

    def publish(self, hashes: Iterable[bytes]) -> None:
        self.cached.update(dict.fromkeys(told := list(hashes)))
        self._tell(KVEvents.published(told))

    def retract(self, hashes: Iterable[bytes]) -> None:
        for block_hash in (told := list(hashes)):
            del self.cached[block_hash]
        self._tell(KVEvents.retracted(told))

    def _tell(self, events: KVEvents) -> None:
        self.publisher.offer(KvEventBatch(self.epoch, self.sequence, events))
        self.sequence += len(events)

    async def snapshot(self) -> AsyncIterator[KvEventBatch]:
        self.num_snapshots += 1
        await asyncio.sleep(0)
        yield KvEventBatch(self.epoch, self.sequence, await self._all())


class PlayedGateway:
    """A mirror, and where its snapshots come from."""

    def __init__(self, url: str, *workers: PlayedWorker, digest: str = DIGEST) -> None:
        client = RedisClient(RedisUrl.parse(url), timeout_s=TIMEOUT_S)
        keys = KeySpace("tailrace")
        self.workers = {worker.worker_id: worker for worker in workers}
        self.index = MemoryIndex()
        self.feeds = Feeds(self.index)
        self.registry = Registry(client, keys, SECRET)
        self.mirror = Mirror(
            client, keys, self.registry, self.feeds, gateway_id="g0", model_digest=digest, snapshot=self._snapshot
        )

    def _snapshot(self, registration: Registration) -> Snapshot:
        return self.workers[registration.worker_id].snapshot

    def knows(self, worker: PlayedWorker) -> bool:
        """All that the worker holds, and no more."""
        hashes = list(worker.cached)
        depth = self.index.longest_prefix(hashes).get(worker.worker_id, 0)
        return depth == len(hashes) == self.index.num_blocks(worker.worker_id)


@contextlib.asynccontextmanager
async def running(*parts: PlayedWorker | PlayedGateway) -> AsyncIterator[None]:
    runs = [(part.publisher if isinstance(part, PlayedWorker) else part.mirror).run() for part in parts]
    async with in_background(*runs):
        yield

"""Cached blocks pulled for what this worker computes itself.

A new prompt's are pulled from whom its submission names, those of a sequence that gave way from the store of this
machine.
"""

import asyncio
import logging
from dataclasses import dataclass
from typing import Protocol

from services.decode.worker import DecodeWorker
from tailrace.errors import TailraceError
from tailrace.kv.layout import KVLayout
from tailrace.messages import KvSource, PrefixSource
from tailrace.worker.engine_thread import EngineThread
from tailrace.worker.prefix_fetch import PrefixPull, PulledPrefix, WantedPrefix
from tailrace.worker.reading import Peers
from tailrace.worker.report import PrefixDestination

log = logging.getLogger(__name__)


class FindingPeers(Peers, Protocol):
    async def find(self, address: str) -> KvSource: ...


@dataclass(slots=True, eq=False)
class _Fetch:
    destination: PrefixDestination
    pull: PrefixPull | None = None
    """None: it has asked nobody yet."""


class LocalFetches:
    """Event loop only. Each fetch that begins ends with one `end_swap`, whatever becomes of those who were asked."""

    def __init__(
        self, worker: DecodeWorker, engine: EngineThread, peers: FindingPeers, layout: KVLayout, *, store: str | None
    ) -> None:
        """`store`: the address of this machine's; None: there is none."""
        self._worker = worker
        self._engine = engine
        self._peers = peers
        self._layout = layout
        self._address = store
        self._store: KvSource | None = None
        """Who was there when it lent something last."""
        self._named: dict[int, tuple[PrefixSource, ...]] = {}
        """By leg that may still be told to fetch."""
        self._tasks: dict[_Fetch, asyncio.Task[None]] = {}

    def name(self, leg_id: int, sources: tuple[PrefixSource, ...]) -> None:
        """Who holds blocks of its prompt; until `forget`."""
        if sources:
            self._named[leg_id] = sources

    def forget(self, leg_id: int) -> None:
        """The leg is over, or was refused. Idempotent."""
        self._named.pop(leg_id, None)
        for fetch, task in self._tasks.items():
            if fetch.destination.prompt_of == leg_id:
                task.cancel()

    def begin(self, destination: PrefixDestination) -> None:
        fetch = _Fetch(destination)
        task = asyncio.create_task(self._run(fetch), name=f"fetch {destination.request_id}")
        self._tasks[fetch] = task
        # Not at the end of the task itself: one that is cancelled at once never begins.
        task.add_done_callback(lambda task: self._end(fetch, task))

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, fetch: _Fetch) -> None:
        destination = fetch.destination
        try:
            sources = await self._sources(destination)
        except (TailraceError, TimeoutError) as error:
            log.info("the store at %s cannot be asked for what was lost here: %s", self._address, error or "no answer")
            return
        engine, worker, fetch_id = self._engine, self._worker, destination.request_id
        fetch.pull = PrefixPull(
            WantedPrefix.of(destination, self._layout),
            sources,
            landed=lambda blocks: engine.post(worker.swap_landed, fetch_id, blocks),
            settled=lambda blocks: engine.post(worker.settle, blocks),
        )
        await fetch.pull.run(self._peers, destination.patience_s)

    async def _sources(self, destination: PrefixDestination) -> tuple[PrefixSource, ...]:
        """Raises TimeoutError and what `find` raises."""
        if destination.prompt_of is not None:
            # A leg that is over has named nobody, and its fetch ends at once.
            return self._named.pop(destination.prompt_of, ())
        assert self._address is not None, "nothing comes back from a store that is not there"
        if self._store is None:
            async with asyncio.timeout(destination.patience_s):
                self._store = await self._peers.find(self._address)
        return (PrefixSource(self._store, 0, len(destination.blocks)),)

    def _end(self, fetch: _Fetch, task: asyncio.Task[None]) -> None:
        del self._tasks[fetch]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a fetch failed in a way that nobody thought of; what it was for is computed", exc_info=error)
        in_flight = fetch.pull.close() if fetch.pull is not None else []
        pulled = fetch.pull.result() if fetch.pull is not None else PulledPrefix()
        destination = fetch.destination
        if destination.prompt_of is None:
            num_lost = len(destination.blocks) - destination.num_local
            log.debug("%d of %d lost blocks came back, in %.3f s", len(pulled.tiers), num_lost, pulled.seconds)
            if not pulled.tiers:
                # It may be another one by now.
                self._store = None
        self._engine.post(self._worker.end_swap, destination.request_id, pulled, in_flight)

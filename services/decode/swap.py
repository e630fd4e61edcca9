"""Blocks of sequences that gave way, pulled back from the store of this machine."""

import asyncio
import logging
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


class StorePeers(Peers, Protocol):
    async def find(self, address: str) -> KvSource: ...


class SwapPulls:
    """Event loop only. Each swap that begins ends with one `end_swap`, whatever becomes of the store."""

    def __init__(
        self, address: str, worker: DecodeWorker, engine: EngineThread, peers: StorePeers, layout: KVLayout
    ) -> None:
        """`address`: of the store."""
        self._address = address
        self._worker = worker
        self._engine = engine
        self._peers = peers
        self._layout = layout
        self._store: KvSource | None = None
        """Who was there when it lent something last."""
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, swap: PrefixDestination) -> None:
        task = asyncio.create_task(self._run(swap), name=f"swap {swap.request_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, swap: PrefixDestination) -> None:
        pull, store = None, self._store
        try:
            async with asyncio.timeout(swap.patience_s):
                store = store or await self._peers.find(self._address)
            pull = self._pull(swap, store)
            await pull.run(self._peers, swap.patience_s)
        except (TailraceError, TimeoutError) as error:
            log.info("the store at %s cannot be asked for what was lost here: %s", self._address, error or "no answer")
        except Exception:
            log.exception("a swap failed in a way that nobody thought of; its sequence is computed again")
        finally:
            in_flight = pull.close() if pull is not None else []
            pulled = pull.result() if pull is not None else PulledPrefix()
            num_wanted = len(swap.blocks) - swap.num_local
            log.debug("%d of %d lost blocks came back, in %.3f s", len(pulled.tiers), num_wanted, pulled.seconds)
            # A store that lent nothing may be another one by now.
            self._store = store if pulled.tiers else None
            self._engine.post(self._worker.end_swap, swap.request_id, pulled, in_flight)

    def _pull(self, swap: PrefixDestination, store: KvSource) -> PrefixPull:
        engine, worker = self._engine, self._worker
        return PrefixPull(
            WantedPrefix(swap.hashes, swap.blocks, swap.num_local, self._layout.block_bytes, self._layout.block_size),
            (PrefixSource(store, 0, len(swap.blocks)),),
            landed=lambda blocks: engine.post(worker.swap_landed, swap.request_id, blocks),
            settled=lambda blocks: engine.post(worker.settle, blocks),
        )

"""A worker process: what prefill and decode set up alike, from the configuration to the last goodbye."""

import contextlib
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from tailrace import __version__
from tailrace.checkpoint.resolve import resolve_model
from tailrace.config import WorkerConfig
from tailrace.engine.engine import Engine, EngineOptions, load_engine
from tailrace.errors import ConfigError
from tailrace.kv.block_pool import BlockPool
from tailrace.kv.events import KVEvents
from tailrace.kv.layout import KVLayout
from tailrace.kv.window import Window
from tailrace.messages import (
    Holding,
    KvEventBatch,
    KvSource,
    LedgerReport,
    LendDone,
    LendTerms,
    LentBlocks,
    Load,
    WorkerInfo,
)
from tailrace.policy.offers import OfferPolicy
from tailrace.policy.request import StopRule
from tailrace.policy.swap import SwapCost
from tailrace.rpc.gen import kv_pb2_grpc
from tailrace.rpc.server import KvOwnerServicer, Server, add_worker
from tailrace.transfer import PeerEndpoints, PoolMemory, TransferPlane, open_transfer
from tailrace.types import Role
from tailrace.worker.attach import Attachments
from tailrace.worker.cached_lending import CachedLender
from tailrace.worker.compute_thread import ComputeThread
from tailrace.worker.engine_thread import EngineThread
from tailrace.worker.lending import Lender
from tailrace.worker.life import until_told
from tailrace.worker.member import Identity, Membership, advertised_address, transfer_options
from tailrace.worker.offering import StoreOffers
from tailrace.worker.peers import OwnerPeers
from tailrace.worker.runner import Runner

log = logging.getLogger(__name__)

PROGRESS_S = 2.0
SNAPSHOT_BLOCKS = 4096
"""Hashes in one message of a snapshot."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What exists before a role is built on it."""

    config: WorkerConfig
    identity: Identity
    engine: Engine
    pool: BlockPool
    transfer: TransferPlane

    @property
    def layout(self) -> KVLayout:
        return self.engine.layout

    @property
    def stop_rule(self) -> StopRule:
        return StopRule(frozenset(self.engine.config.eos_token_ids), self.engine.max_model_len)

    @property
    def on_gpu(self) -> bool:
        return self.engine.cache.tensor.device.type != "cpu"

    @property
    def overlap(self) -> bool:
        """Whether a step is scheduled while the one before it computes (docs/adr/0013-overlapped-steps.md)."""
        if self.config.overlap_scheduling != "auto":
            return self.config.overlap_scheduling == "on"
        return self.on_gpu

    def offer_policy(self) -> OfferPolicy | None:
        """None where no store is configured."""
        if not self.config.store:
            return None
        span = Window(self.layout.window, self.layout.block_size).span
        return OfferPolicy(self.pool, low_water=self.config.offer_low_water, span=span)

    def swap_cost(self) -> SwapCost | None:
        """None where no store is configured."""
        layout = self.layout
        return SwapCost(block_bytes=layout.block_bytes, block_tokens=layout.block_size) if self.config.store else None

    def owner_peers(self) -> OwnerPeers:
        """To be closed before the transfer plane. To be called on the event loop."""
        me, needer = self.identity, self.transfer.needer
        return OwnerPeers(needer, self.layout, worker_id=me.worker_id, epoch=me.epoch, secret=me.secret)

    def step_runner(self) -> Runner:
        """A GPU computes beside the engine's thread by itself; a CPU needs a thread for it."""
        return ComputeThread(self.engine.runner) if self.overlap and not self.on_gpu else self.engine.runner


class LoggedProgress:
    """Says how far a long load is, now and then; a short one says nothing."""

    def __init__(self) -> None:
        self._told_at = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._told_at >= PROGRESS_S and total > 0:
            self._told_at = now
            log.info("%s: %d%% of %.1f GB", what, 100 * done // total, total / 1e9)


class BooksOfWorker(Protocol):
    """What the host asks of a role's worker, on its engine thread."""

    def holdings(self) -> list[Holding]: ...

    def check_integrity(self) -> None: ...


@dataclass(slots=True)
class Wiring:
    """A role, wired up by its `main` and run by `serve`."""

    engine: EngineThread
    attachments: Attachments
    worker: BooksOfWorker
    lender: Lender | None = None
    """None: this role lends nothing by ticket."""
    offers: StoreOffers | None = None


def load_parts(config: WorkerConfig, role: Role) -> tuple[Identity, Engine, BlockPool]:
    """The slow part of starting, before there is an event loop. Raises ConfigError or CheckpointError."""
    identity = Identity.draw(config, role)
    progress = LoggedProgress()
    directory = resolve_model(config.model, revision=config.revision, cache_dir=config.cache_dir, progress=progress)
    engine = load_engine(
        EngineOptions(
            model_dir=directory,
            dtype=config.dtype,
            block_size=config.block_size,
            num_blocks=config.num_blocks,
            kv_cache_bytes=config.kv_cache_memory,
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len,
            load_format="dummy" if config.load_format == "dummy" else "auto",
            num_threads=config.num_threads,
            device=config.device,
            quantization=config.quantization,
            native=config.native_kernels,
            enforce_eager=config.enforce_eager,
            cache_dir=config.cache_dir,
        ),
        progress=progress,
    )
    _say_what_is_kept(engine)
    pool = BlockPool(engine.cache.num_blocks, epoch=identity.epoch, prefix_caching=config.prefix_caching)
    return identity, engine, pool


def _say_what_is_kept(engine: Engine) -> None:
    """Of a model in which some layers have a window: as much as if none had one (docs/adr/0026-windows.md)."""
    layout, longest = engine.layout, engine.max_model_len
    windowed = [group for group in layout.groups if group.window]
    if windowed and not layout.window:
        log.info(
            "%d of %d layers see %d tokens at most, the others all: the cache keeps all tokens for every layer; "
            "a sequence of %d tokens takes %.1f MiB",
            sum(len(group.layers) for group in windowed),
            layout.num_layers,
            max(group.window for group in windowed),
            longest,
            -(-longest // layout.block_size) * layout.block_bytes / (1 << 20),
        )


async def open_plane(config: WorkerConfig, identity: Identity, engine: Engine, pool: BlockPool) -> TransferPlane:
    cache = engine.cache
    on_cpu = cache.tensor.device.type == "cpu"
    memory = PoolMemory(
        address=cache.address,
        block_bytes=cache.block_bytes,
        num_blocks=cache.num_blocks,
        view=cache.memory if on_cpu else None,
        stamps=pool.stamps,
        memory="dram" if on_cpu else "vram",
        device=cache.tensor.device.index or 0,
    )
    return await open_transfer(memory, transfer_options(config, identity))


class WorkerHost:
    """Answers for a worker as a whole: Meet, Lend, Control."""

    def __init__(self, parts: Parts, wiring: Wiring) -> None:
        self.layout = parts.layout
        self._parts = parts
        self._wiring = wiring
        self._cached = CachedLender(
            parts.pool,
            wiring.engine,
            block_bytes=parts.layout.block_bytes,
            block_tokens=parts.layout.block_size,
            pool_address=parts.engine.cache.address,
        )

    # -- Owning -------------------------------------------------------------------------------------------------------

    def meet(self, needer_id: str, needer_epoch: int) -> PeerEndpoints:
        log.info("met by %s", needer_id)
        self._parts.transfer.owner.note_meeting()
        return self._parts.transfer.owner.endpoints()

    async def lend(self, terms: LendTerms) -> AsyncGenerator[LentBlocks | LendDone, None]:
        if self._wiring.lender is None and not terms.block_hashes:
            raise ConfigError(f"{self._parts.identity.worker_id} lends cached blocks only", param="ticket")
        lend = self._cached.lend if self._wiring.lender is None or terms.block_hashes else self._wiring.lender.lend
        with self._parts.transfer.owner.lending(terms.transport):
            async with contextlib.aclosing(lend(terms)) as events:
                async for event in events:
                    yield event

    # -- Controlled ---------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        log.info("draining: %d legs left", self._wiring.attachments.num_legs)
        self._wiring.attachments.is_draining = True

    def load(self) -> Load:
        return self._wiring.attachments.load

    async def ledger(self) -> LedgerReport:
        """Checked against the pool's own books, on the engine's thread."""
        return await self._wiring.engine.call(self._ledger)

    def _ledger(self) -> LedgerReport:
        self._wiring.worker.check_integrity()
        books, identity = self._parts.pool.ledger(), self._parts.identity
        return LedgerReport(
            worker_id=identity.worker_id,
            epoch=identity.epoch,
            total=books.total,
            free=books.free,
            active=books.active,
            cached=books.cached,
            lent=books.lent,
            landing=books.landing,
            quarantined=books.quarantined,
            holdings=(*self._wiring.worker.holdings(), *self._cached.holdings()),
        )

    async def cached(self) -> KVEvents:
        """Publications of all that is findable."""
        return KVEvents.published(await self._wiring.engine.call(self._parts.pool.cached_hashes))

    async def snapshot(self) -> AsyncIterator[KvEventBatch]:
        hashes = await self._wiring.engine.call(self._parts.pool.cached_hashes)
        # Events of the steps before have been delivered by now, and those after it may repeat what it says.
        sequence, epoch = self._wiring.attachments.kv_sequence, self._parts.identity.epoch
        for start in range(0, max(1, len(hashes)), SNAPSHOT_BLOCKS):
            piece = hashes[start : start + SNAPSHOT_BLOCKS]
            yield KvEventBatch(epoch, sequence, KVEvents.published(piece))


def make_offers(parts: Parts, port: int) -> StoreOffers | None:
    """None where no store is configured. To be called on the event loop."""
    config, identity = parts.config, parts.identity
    if config.store is None:
        return None
    source = KvSource(identity.worker_id, identity.epoch, advertised_address(config, port), b"")
    return StoreOffers(config.store, identity.secret, source=source, layout=parts.layout)


def worker_info(config: WorkerConfig, identity: Identity, engine: Engine, port: int) -> WorkerInfo:
    return WorkerInfo(
        worker_id=identity.worker_id,
        epoch=identity.epoch,
        role=identity.role,
        layout=engine.layout,
        model=config.model_names[0],
        max_model_len=engine.max_model_len,
        max_num_seqs=config.max_num_seqs,
        num_blocks=engine.cache.num_blocks,
        address=advertised_address(config, port),
        version=__version__,
    )


async def serve(parts: Parts, wiring: Wiring, server: Server) -> None:
    """Run until SIGTERM or SIGINT, or until the engine fails (then raises). Ends by closing everything, in order."""
    host = WorkerHost(parts, wiring)
    add_worker(server, lambda: wiring.attachments, host)
    kv_pb2_grpc.add_KvOwnerServiceServicer_to_server(KvOwnerServicer(host), server.grpc)
    wiring.engine.start()
    await server.start()
    address, layout = wiring.attachments.info.address, parts.layout
    blocks = parts.pool.num_blocks, layout.block_size
    log.info("ready on %s: %s; %d blocks of %d tokens", address, layout.arithmetic, *blocks)
    membership = Membership(parts.config, wiring.attachments, parts.identity.secret, cached=host.cached)
    try:
        await until_told(parts.config.parent_pid)
    finally:
        await membership.close()
        if wiring.offers is not None:
            await wiring.offers.close()
        await server.stop()
        await wiring.engine.stop()
        await parts.transfer.close()


def die(error: BaseException) -> None:
    """The engine's thread is gone, and with it the books: only a new process can go on."""
    log.critical("stopping: %r", error)
    os._exit(70)

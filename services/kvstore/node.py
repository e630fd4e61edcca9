"""The store as its event loop sees it: workers that offer, needers that borrow, a disk that has news."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass

from services.kvstore.membership import NO_BLOCKS_YET, StoreMembership
from services.kvstore.storage import Storage, open_storage
from tailrace.config import KvStoreConfig
from tailrace.errors import LayoutMismatchError, OverloadedError, TailraceError, TransferError, UnavailableError
from tailrace.kv.events import KVEvents, Tier
from tailrace.kv.layout import KVLayout
from tailrace.kvstore.loan import Loan
from tailrace.kvstore.values import Arrival, OfferedBlock
from tailrace.messages import (
    BlockOffer,
    Holding,
    HoldingState,
    KvEventBatch,
    LedgerReport,
    LendDone,
    LendTerms,
    LentBlocks,
    Load,
)
from tailrace.transfer import BlockRead, PeerEndpoints, PendingRead, ReadOutcome
from tailrace.worker.member import Identity
from tailrace.worker.peers import OwnerPeers
from tailrace.worker.report import StepReport

log = logging.getLogger(__name__)

MAX_PULLS = 16
"""Open at once; offers beyond are declined, not queued: the worker may offer again."""
MAX_LOANS = 256
PULL_TIMEOUT_S = 10.0
"""A read that takes longer is stalled: its slots are quarantined until it ends."""
ASK_AGAIN_S = 0.05
MAX_VAIN_ASKS = 40
"""A worker lends little at a time: while it has nothing left to lend of what it has, it is asked again so often."""
SNAPSHOT_BLOCKS = 4096


@dataclass(slots=True, eq=False)
class _OpenLoan:
    """For the ledger: who holds what since when."""

    needer_id: str
    since: float
    loan: Loan
    slots: list[int]


class StoreNode:
    """Event loop only. Answers Meet, Lend, Offer and Control."""

    def __init__(self, config: KvStoreConfig, identity: Identity, membership: StoreMembership) -> None:
        self._config = config
        self._identity = identity
        self._loop = asyncio.get_running_loop()
        self._opening: asyncio.Task[Storage] | None = None
        self._storage: Storage | None = None
        self._peers: OwnerPeers | None = None
        self._pulls: set[asyncio.Task[None]] = set()
        self._loans: set[_OpenLoan] = set()
        self._reads: dict[PendingRead, list[Arrival]] = {}
        """Stalled ones."""
        self._is_draining = False
        self._refused: set[str] = set()
        self.membership = membership
        self._will_tell = False

    @property
    def storage(self) -> Storage | None:
        """None until it is known what a block is."""
        return self._storage

    async def open(self, layout: KVLayout) -> Storage:
        """Makes the storage where there is none. Raises ConfigError, LayoutMismatchError when it keeps other blocks."""
        storage = self._storage
        if storage is None:
            if self._opening is None or self._opening.done():
                self._opening = asyncio.create_task(self._open(layout))
            # Others may wait for the same: an offer that is cancelled leaves it alone.
            storage = await asyncio.shield(self._opening)
        if differences := storage.layout.differences(layout):
            raise LayoutMismatchError(f"this store keeps blocks of another layout: {'; '.join(differences)}")
        return storage

    async def close(self) -> None:
        """Ends what is open, brings the file up to date."""
        # No offer opens the storage from here on; what is being opened begins a membership that must be closed.
        self._is_draining = True
        await asyncio.gather(*([self._opening] if self._opening else []), return_exceptions=True)
        await self.membership.close()
        for task in self._pulls:
            task.cancel()
        await asyncio.gather(*self._pulls, return_exceptions=True)
        if self._peers is not None:
            await self._peers.close()
        # From here on the store is another thread's: whatever this loop still hears of it finds none.
        storage, self._storage = self._storage, None
        if storage is not None:
            for entry in self._loans:
                entry.loan.close()
            storage.store.news.on_first = _do_nothing
            await storage.close()

    # -- Owning -------------------------------------------------------------------------------------------------------

    @property
    def layout(self) -> KVLayout:
        return self.ready().layout

    def meet(self, needer_id: str, needer_epoch: int) -> PeerEndpoints:
        log.info("met by %s", needer_id)
        owner = self.ready().plane.owner
        owner.note_meeting()
        return owner.endpoints()

    async def lend(self, terms: LendTerms) -> AsyncGenerator[LentBlocks | LendDone, None]:
        """Blocks by their hashes, in order, as they come from disk; held until the iterator is closed."""
        storage = self.ready()
        if len(self._loans) >= MAX_LOANS:
            raise OverloadedError(f"{MAX_LOANS} loans are open")
        news = asyncio.Event()
        loan = storage.store.borrow(terms.block_hashes, news.set)
        entry = _OpenLoan(terms.needer_id, time.monotonic(), loan, [])
        self._loans.add(entry)
        self._changed()
        base = storage.plane.owner.pool_address
        try:
            with storage.plane.owner.lending(terms.transport):
                while True:
                    # Before it is asked what is ready: what comes while that is told must wake us.
                    news.clear()
                    if ready := loan.take_ready():
                        slots = [lent.slot for lent in ready]
                        entry.slots += slots
                        addresses = [base + slot * storage.store.block_bytes for slot in slots]
                        tiers = bytes(Tier.NVME if lent.came_from_disk else Tier.CPU for lent in ready)
                        yield LentBlocks(ready[0].index, slots, addresses, [lent.generation for lent in ready], tiers)
                    if loan.is_complete:
                        break
                    await news.wait()
                # More than was lent where there was no memory to read the rest into: it may be asked for afterwards.
                tokens = len(storage.store.find_prefix(terms.block_hashes)) * storage.layout.block_size
                yield LendDone((), last_block_tokens=0, cached_tokens=tokens, queue_s=0.0, prefill_s=0.0)
                # The needer reads on until it closes the stream.
                await asyncio.Event().wait()
        finally:
            self._loans.remove(entry)
            loan.close()
            if self._storage is storage:
                storage.store.pump()
                self._changed()

    # -- offers -------------------------------------------------------------------------------------------------------

    async def offer(self, offer: BlockOffer) -> tuple[bytes, ...]:
        """Which of them will be pulled. Raises LayoutMismatchError, ConfigError."""
        if not self._takes_offers:
            return ()
        try:
            storage = await self.open(offer.layout)
        except TailraceError as error:
            self._say_once(offer.source.worker_id, error)
            raise
        # Many may have waited for that.
        if not self._takes_offers:
            return ()
        wanted = storage.store.wanted(offer.block_hashes, offer.tenant)
        if wanted:
            task = asyncio.create_task(self._pull(storage, offer, wanted), name=f"pull from {offer.source.worker_id}")
            self._pulls.add(task)
            self._changed()
            task.add_done_callback(self._pulled)
        return tuple(piece.block_hash for piece in wanted)

    @property
    def _takes_offers(self) -> bool:
        return not self._is_draining and len(self._pulls) < MAX_PULLS

    def _pulled(self, task: "asyncio.Task[None]") -> None:
        self._pulls.discard(task)
        self._changed()

    def _say_once(self, worker_id: str, error: TailraceError) -> None:
        if worker_id not in self._refused:
            self._refused.add(worker_id)
            log.error("offers of %s are refused: %s", worker_id, error.message)

    async def _pull(self, storage: Storage, offer: BlockOffer, wanted: list[OfferedBlock]) -> None:
        try:
            await self._try_pull(storage, offer, wanted)
        except TailraceError as error:
            log.warning("blocks of %s could not be pulled: %s", offer.source.worker_id, error.message)

    async def _try_pull(self, storage: Storage, offer: BlockOffer, wanted: list[OfferedBlock]) -> None:
        if self._peers is None:
            raise UnavailableError("the store is not open")
        vain = 0
        while wanted and vain < MAX_VAIN_ASKS:
            num_taken = await self._pull_some(self._peers, storage, offer, wanted)
            if num_taken is None:
                return
            if not num_taken:
                vain += 1
                await asyncio.sleep(ASK_AGAIN_S)
            wanted = wanted[num_taken:]

    async def _pull_some(
        self, peers: OwnerPeers, storage: Storage, offer: BlockOffer, wanted: list[OfferedBlock]
    ) -> int | None:
        """How many of them, from the first on, have come. None: there is no more to be had, or no room for it."""
        link = await peers.link(offer.source)
        names = tuple(piece.block_hash for piece in wanted)
        identity = self._identity
        terms = LendTerms("", 0, b"", identity.worker_id, identity.epoch, link.transport, block_hashes=names)
        async with peers.lend(offer.source, terms) as events:
            async for event in events:
                if isinstance(event, LendDone):
                    return 0 if event.cached_tokens else None
                if event.first_index or len(event.blocks) > len(wanted):
                    raise TransferError(f"{offer.source.worker_id} lent blocks that nobody asked for")
                lent = wanted[: len(event.blocks)]
                if arrivals := storage.store.reserve(lent, offer.tenant):
                    if not await self._read(storage, link.read(_reads(arrivals, names, event)), arrivals):
                        return None
                elif any(piece.block_hash not in storage.store for piece in lent):
                    return None
                # Otherwise another pull has brought them, or is about to: on to the rest of the chain.
                if lent:
                    return len(lent)
        return None

    async def _read(self, storage: Storage, read: PendingRead, arrivals: list[Arrival]) -> bool:
        """A slot is landing until its read has settled, whatever becomes of the task. False: the owner took it back."""
        try:
            result = await read.wait(PULL_TIMEOUT_S)
        except asyncio.CancelledError:
            self._set_aside(storage, read, arrivals)
            raise
        if result is None:
            self._set_aside(storage, read, arrivals)
            raise TransferError(f"a read of {len(arrivals)} blocks stalls; its slots are quarantined")
        if result.outcome is ReadOutcome.GOOD:
            storage.store.landed(arrivals)
            return True
        storage.store.abandon(arrivals)
        if result.outcome is ReadOutcome.STALE:
            # Offers are revocable: nothing is wrong.
            log.debug("a pull ends, its loan was revoked: %s", result.message)
            return False
        raise TransferError(result.message or result.outcome)

    def _set_aside(self, storage: Storage, read: PendingRead, arrivals: list[Arrival]) -> None:
        storage.store.quarantine(arrivals)
        self._reads[read] = arrivals

        def settled(_: object) -> None:
            del self._reads[read]
            if self._storage is storage:
                storage.store.abandon(arrivals)
                self._changed()

        read.settled.add_done_callback(settled)

    # -- Controlled ---------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Nothing more is taken; what is there is lent on."""
        log.info("draining: %d pulls left", len(self._pulls))
        self._is_draining = True
        self._changed()

    def load(self) -> Load:
        if self._storage is None:
            return Load(draining=self._is_draining)
        books = self._storage.store.ledger().memory
        return Load(
            num_running=len(self._loans) + len(self._pulls),
            total_blocks=books.total,
            free_blocks=books.free,
            cached_blocks=books.cached,
            lent_blocks=books.lent,
            landing_blocks=books.landing,
            quarantined_blocks=books.quarantined,
            draining=self._is_draining,
            links=self._storage.plane.needer.links(),
        )

    async def ledger(self) -> LedgerReport:
        """Of the memory tier, checked; the disk tier is checked with it."""
        identity = self._identity
        if self._storage is None:
            return LedgerReport(identity.worker_id, identity.epoch, 0, 0, 0, 0, 0, 0, 0)
        store = self._storage.store
        store.check_integrity()
        books = store.ledger().memory
        return LedgerReport(
            worker_id=identity.worker_id,
            epoch=identity.epoch,
            total=books.total,
            free=books.free,
            active=0,
            cached=books.cached,
            lent=books.lent,
            landing=books.landing,
            quarantined=books.quarantined,
            holdings=tuple(self._holdings()),
        )

    async def cached(self) -> KVEvents:
        """Publications of all that could be lent."""
        events = KVEvents()
        if self._storage is not None:
            for tier in (Tier.CPU, Tier.NVME):
                events += KVEvents.published(self._storage.store.held_hashes(tier), tier)
        return events

    async def snapshot(self) -> AsyncIterator[KvEventBatch]:
        """`cached`, in pieces; each is numbered with the event that comes after all of it."""
        self._tell()
        sequence, events = self.membership.sequence, await self.cached()
        for start in range(0, max(1, len(events)), SNAPSHOT_BLOCKS):
            yield KvEventBatch(self._identity.epoch, sequence, events[start : start + SNAPSHOT_BLOCKS])

    def _holdings(self) -> list[Holding]:
        now = time.monotonic()
        lent = [Holding(e.needer_id, HoldingState.LENT, tuple(e.slots), now - e.since) for e in self._loans]
        stalled = [
            Holding("a stalled read", HoldingState.QUARANTINED, tuple(a.slot for a in arrivals), 0.0)
            for arrivals in self._reads.values()
        ]
        return lent + stalled

    # -- inside -------------------------------------------------------------------------------------------------------

    async def _open(self, layout: KVLayout) -> Storage:
        identity = self._identity
        self._storage = storage = await open_storage(self._config, identity, layout, self._on_disk_news)
        self._peers = OwnerPeers(
            storage.plane.needer,
            layout,
            worker_id=identity.worker_id,
            epoch=identity.epoch,
            secret=identity.secret,
        )
        storage.store.news.on_first = self._changed
        self.membership.begin(storage, self.load())
        return storage

    def ready(self) -> Storage:
        """Raises UnavailableError before it is known what a block is."""
        if self._storage is None:
            raise UnavailableError(NO_BLOCKS_YET)
        return self._storage

    def _changed(self) -> None:
        """Gateways are told of this turn of the loop at its end, once."""
        if not self._will_tell:
            self._will_tell = True
            self._loop.call_soon(self._tell)

    def _tell(self) -> None:
        self._will_tell = False
        if self._storage is not None:
            events = self._storage.store.news.drain()
            self.membership.tell(StepReport(load=self.load(), kv_events=events))

    def _on_disk_news(self) -> None:
        """On a thread of the disk's."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
            self._loop.call_soon_threadsafe(self._pump)

    def _pump(self) -> None:
        if self._storage is not None:
            self._storage.store.pump()
            self._changed()


def _do_nothing() -> None:
    """Hears news that nobody tells on."""


def _reads(arrivals: list[Arrival], names: tuple[bytes, ...], lent: LentBlocks) -> list[BlockRead]:
    places = {name: index for index, name in enumerate(names)}
    return [
        BlockRead(lent.blocks[index], lent.addresses[index], lent.generations[index], arrival.slot)
        for arrival in arrivals
        for index in (places[arrival.block.block_hash],)
    ]

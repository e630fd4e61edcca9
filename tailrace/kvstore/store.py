"""KvStore: which blocks are kept, where, and for whom. The memory tier is what peers read; the disk tier is behind it.

Every decision is made here, at once, on one thread; copies to and from the disk are done by others, and their ends are
booked by `pump`. Refusal is a value, misuse a ValueError, corruption an AssertionError.
"""

import mmap
import time
from collections import deque
from collections.abc import Callable, Sequence

from tailrace.host_memory import FirstTouch, map_memory
from tailrace.kv.events import Tier
from tailrace.kvstore.counters import StoreCounters
from tailrace.kvstore.disk_io import ReadJob, WriteJob
from tailrace.kvstore.disk_tier import DiskTier
from tailrace.kvstore.loan import Loan, LoanedBlock
from tailrace.kvstore.news import StoreNews
from tailrace.kvstore.pins import PinRefusal, Pins
from tailrace.kvstore.slab_file import MAX_TENANT_BYTES, SlabFile
from tailrace.kvstore.slots import SlotTable, StoredBlock, TierLedger
from tailrace.kvstore.values import Arrival, OfferedBlock, StoreLedger

WINDOW = 8
"""Reads from disk in flight for one loan: enough to keep the disk busy, few enough that loans take turns."""
WRITE_LINE_SHARE = 4
"""At most one memory slot in so many is kept until its block is written: a slow disk must not freeze the tier."""
PIN_SHARE = 2
"""At most one slot of the memory tier in so many is pinned."""
FLUSH_S = 5.0
"""A store that ends writes for so long what is in line: whoever ends it does not wait for ever."""
_NO_TIER = TierLedger(0, 0, 0, 0, 0, 0)


class KvStore:
    """Used by one thread; `on_done` given to `open_disk` may be called from another."""

    def __init__(self, block_bytes: int, num_slots: int, *, epoch: int = 0) -> None:
        """`block_bytes`, `num_slots`: of the memory tier. Raises OSError where there is no room for it."""
        if block_bytes < 1:
            raise ValueError(f"block_bytes must be at least 1, not {block_bytes}")
        self.block_bytes = block_bytes
        self._slab: mmap.mmap = map_memory(num_slots * block_bytes)  # first: where it fails no books are made
        self.memory = SlotTable(num_slots, epoch=epoch)
        self.disk: DiskTier | None = None
        self.counters = StoreCounters()
        self.news = StoreNews()
        self.first_touch = FirstTouch(self._slab)
        self.view = memoryview(self._slab)
        """The bytes of the memory tier, slot after slot."""
        self._blocks: dict[bytes, StoredBlock] = {}
        self._moment = 0
        self._unwritten: deque[StoredBlock] = deque()
        """Next to be written; their memory slots are held until then."""
        self._unwritten_later: dict[bytes, StoredBlock] = {}
        """Behind them, and given up like all others."""
        self._reading: set[bytes] = set()
        self._waiting: list[Loan] = []
        """Loans that have not all of their blocks in memory yet."""
        self.pins = Pins(num_slots // PIN_SHARE)

    def open_disk(self, file: SlabFile, on_done: Callable[[], None]) -> None:
        """Take over what the file has. `on_done`: `pump` has something to do. Raises OSError, ValueError.

        The caller keeps the file, and closes it, when this raises.
        """
        if file.block_bytes != self.block_bytes or self._blocks:
            raise ValueError("a disk tier is opened first of all, for blocks of the same size")
        disk = DiskTier(file, on_done)
        blocks, num_bad = disk.restore()
        for block in blocks:
            self.news.skip(block)
        self.disk = disk
        self._blocks = {block.block_hash: block for block in blocks}
        self._moment = 1 + max((block.moment for block in blocks), default=0)
        self.counters.restored, self.counters.restored_bad = len(blocks), num_bad

    # -- what is there ------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block_hash: bytes) -> bool:
        """Whether it is here, or arriving."""
        return block_hash in self._blocks

    @property
    def num_unwritten(self) -> int:
        """Blocks in line to be written."""
        return len(self._unwritten) + len(self._unwritten_later)

    def find_prefix(self, hashes: Sequence[bytes]) -> list[Tier]:
        """Where each block of the longest prefix is that could be lent. Changes nothing."""
        return [tier for block in self._prefix(hashes) if (tier := block.tier) is not None]

    def held_hashes(self, tier: Tier) -> list[bytes]:
        """Every block that could be lent, and is nearest on this tier."""
        return [block.block_hash for block in self._blocks.values() if block.tier is tier]

    def slot_bytes(self, slot: int) -> memoryview:
        """Of the memory tier."""
        return self.view[slot * self.block_bytes : (slot + 1) * self.block_bytes]

    # -- blocks that come ---------------------------------------------------------------------------------------------

    def wanted(self, chain: Sequence[bytes], tenant: str = "") -> list[OfferedBlock]:
        """Which blocks of a chain, or a part of one, the store would take now. The others count as used."""
        _check_tenant(tenant)
        self.counters.offered += len(chain)
        known = [self._blocks[name] for name in chain if name in self._blocks]
        self._use(known)
        missing = [OfferedBlock(name, n, self._moment) for n, name in enumerate(chain) if name not in self._blocks]
        return missing[: self.memory.room_for(tenant, beside=[b.memory_slot for b in known if b.disk_slot is None])]

    def reserve(self, offered: Sequence[OfferedBlock], tenant: str = "") -> list[Arrival]:
        """Memory slots to read blocks of one chain into; only those that are not there yet, and that there is room
        for."""
        _check_tenant(tenant)
        arrivals: list[Arrival] = []
        for piece in offered:
            if piece.block_hash in self._blocks:
                continue
            slot = self._take_memory(tenant)
            if slot is None:
                break
            block = StoredBlock(piece.block_hash, piece.depth, tenant, piece.moment, is_arriving=True)
            self._blocks[piece.block_hash] = block
            arrivals.append(Arrival(block, slot))
        self._moment += len(arrivals)
        return arrivals

    def landed(self, arrivals: Sequence[Arrival]) -> None:
        """The read was good."""
        for arrival in arrivals:
            self._settle(arrival.block, arrival.slot)
            self.counters.taken += 1
            if self.disk is not None and self.disk.is_on:
                self._unwritten_later[arrival.block.block_hash] = arrival.block
        self.pump()

    def abandon(self, arrivals: Sequence[Arrival]) -> None:
        """The read has ended, and nothing of it may be used. Also ends a quarantine."""
        for arrival in arrivals:
            self.memory.abandon(arrival.slot)
            self._gave_up(arrival.block)

    def quarantine(self, arrivals: Sequence[Arrival]) -> None:
        """The read stalled: its slots are kept apart until `abandon`, and others may bring the blocks."""
        for arrival in arrivals:
            self.memory.quarantine(arrival.slot)
            self._gave_up(arrival.block)

    # -- blocks that go -----------------------------------------------------------------------------------------------

    def borrow(self, hashes: Sequence[bytes], on_news: Callable[[], None] = lambda: None) -> Loan:
        """Lend the longest prefix: at once what is in memory, and what is on disk as it is read.

        A block that proves corrupt, or that there is no memory for, ends the loan before it.
        """
        blocks = self._prefix(hashes)
        self._use(blocks)
        loan = Loan(blocks, len(hashes), on_news, self._give_back)
        for index, block in enumerate(blocks):
            if block.memory_slot is not None:
                self._lend(loan, index, block.memory_slot, came_from_disk=False)
        self._waiting.append(loan)
        self._fetch(loan)
        return loan

    # -- what stays ---------------------------------------------------------------------------------------------------

    def pin(self, hashes: Sequence[bytes], owner: str = "") -> PinRefusal | None:
        """Never give these blocks up, in the tiers where they are, before the owner says so. All of them, or none."""
        found = [self._blocks.get(name) for name in hashes]
        blocks = [block for block in found if block is not None and block.tier is not None]
        if len(blocks) < len(found):
            return PinRefusal(num_missing=len(found) - len(blocks))
        if (refusal := self.pins.refusal(owner, blocks)) is None:
            self.pins.add(owner, blocks)
            self._rerank(blocks)
        return refusal

    def unpin(self, hashes: Sequence[bytes] | None = None, owner: str = "") -> int:
        """Lets go of these blocks, or of all that the owner has pinned; the number that it had pinned."""
        blocks = self.pins.remove(owner, hashes)
        self._rerank(blocks)
        return len(blocks)

    def set_quota(self, tenant: str, memory_slots: int | None, disk_slots: int | None = None) -> bool:
        """How many slots a tenant's blocks may take in each tier; None: as many as there are. False: too many quotas.

        From now on it replaces its own blocks where it is at its quota; what it has is not taken away.
        """
        _check_tenant(tenant)
        if min(memory_slots or 0, disk_slots or 0) < 0:
            raise ValueError(f"a quota must not be negative, not {memory_slots} and {disk_slots}")
        tables = [(self.memory, memory_slots), *([(self.disk.slots, disk_slots)] if self.disk else [])]
        if any(limit is not None and not table.takes_quota(tenant) for table, limit in tables):
            return False
        for table, limit in tables:
            table.set_quota(tenant, limit)
        return True

    # -- the disk -----------------------------------------------------------------------------------------------------

    def pump(self, timeout_s: float = 0.0) -> None:
        """Book the copies that have ended, and start those that can be. `timeout_s`: wait so long for one to end."""
        if self.disk is None:
            return
        self._book(self.disk, timeout_s)
        self._start_writes(self.disk)
        for loan in list(self._waiting):
            if not loan.is_closed:
                self._fetch(loan)

    def flush(self, timeout_s: float) -> bool:
        """Whether nothing waits to be written or is being copied any more. Gives up after `timeout_s` in all."""
        deadline = time.monotonic() + timeout_s
        while self.disk is not None and (self.num_unwritten or self.disk.num_open):
            before, left_s = (self.num_unwritten, self.disk.num_open), deadline - time.monotonic()
            self.pump(max(0.0, left_s))
            if left_s <= 0 or (self.num_unwritten, self.disk.num_open) == before:
                return False
        return True

    def close(self, timeout_s: float = FLUSH_S) -> None:
        """Writes what is in line, for so long, and what is known of the blocks. Nothing may be lent or arriving."""
        self.flush(timeout_s)
        if self.disk is not None:
            self.disk.end()
            self._book(self.disk)
            self.disk.close(self._blocks.values(), self.num_unwritten)

    # -- books --------------------------------------------------------------------------------------------------------

    def ledger(self) -> StoreLedger:
        disk = self.disk.slots.ledger() if self.disk else _NO_TIER
        return StoreLedger(self.memory.ledger(), disk, self.num_unwritten)

    def check_integrity(self) -> None:
        """Recomputes every book from the others. Raises AssertionError where they disagree."""
        self.memory.check_integrity()
        in_memory = {b.memory_slot: b for b in self._blocks.values() if b.memory_slot is not None}
        on_disk = {b.disk_slot: b for b in self._blocks.values() if b.disk_slot is not None}
        _expect(in_memory == self.memory.blocks(), "blocks in memory", len(in_memory))
        if self.disk:
            self.disk.slots.check_integrity()
            _expect(on_disk == self.disk.slots.blocks(), "blocks on disk", len(on_disk))
        _expect(all(block.is_held for block in self._blocks.values()), "blocks", len(self._blocks))
        _expect(all(block.told is block.tier for block in self._blocks.values()), "what was told", len(self._blocks))
        self.pins.check_integrity(self._blocks.values())

    # -- inside -------------------------------------------------------------------------------------------------------

    def _prefix(self, hashes: Sequence[bytes]) -> list[StoredBlock]:
        blocks: list[StoredBlock] = []
        for name in hashes:
            block = self._blocks.get(name)
            if block is None or block.tier is None:
                break
            blocks.append(block)
        return blocks

    def _use(self, blocks: Sequence[StoredBlock]) -> None:
        for block in blocks:
            block.uses += 1
            block.moment = self._moment
            self._rank(block)

    def _rank(self, block: StoredBlock) -> None:
        if block.memory_slot is not None:
            self.memory.update(block.memory_slot)
        if block.disk_slot is not None and self.disk is not None:
            self.disk.slots.update(block.disk_slot)

    def _rerank(self, blocks: Sequence[StoredBlock]) -> None:
        for block in blocks:
            self._rank(block)

    def _take_memory(self, tenant: str) -> int | None:
        taken = self.memory.take(tenant)
        if taken is None:
            return None
        if taken.evicted is not None:
            self.counters.evicted_memory += 1
            taken.evicted.memory_slot = None
            if self._unwritten_later.pop(taken.evicted.block_hash, None) is not None:
                self.counters.unwritten += 1
            self._lost_a_copy(taken.evicted)
        return taken.slot

    def _settle(self, block: StoredBlock, slot: int) -> None:
        block.is_arriving = False
        block.memory_slot = slot
        self.memory.landed(slot, block)
        self.news.note(block)

    def _gave_up(self, block: StoredBlock) -> None:
        if block.is_arriving:
            self.counters.failed_pulls += 1
            block.is_arriving = False
            self._lost_a_copy(block)

    def _lost_a_copy(self, block: StoredBlock) -> None:
        self.news.note(block)
        if not block.is_held:
            self.pins.forget(block)
            del self._blocks[block.block_hash]

    def _book(self, disk: DiskTier, timeout_s: float = 0.0) -> None:
        """Copies that have ended."""
        was_on = disk.is_on
        for write in disk.take_writes(timeout_s if not self._reading else 0.0):
            self._end_write(write)
        for read in disk.take_reads(timeout_s if self._reading else 0.0):
            self._end_read(disk, read)
        if was_on and not disk.is_on:
            self._lose_disk(disk)

    def _line_up(self) -> None:
        """Hold what comes next to be written."""
        while self._unwritten_later and len(self._unwritten) * WRITE_LINE_SHARE < self.memory.num_slots:
            name = next(iter(self._unwritten_later))
            block = self._unwritten_later.pop(name)
            if block.memory_slot is not None:
                self.memory.hold(block.memory_slot)
                self._unwritten.append(block)

    def _start_writes(self, disk: DiskTier) -> None:
        self._line_up()
        while self._unwritten and disk.can_write:
            block = self._unwritten.popleft()
            memory_slot = block.memory_slot
            if memory_slot is None:
                raise AssertionError(f"block {block.block_hash.hex()} left memory before it was written")
            taken = disk.slots.take(block.tenant)
            if taken is None:
                self.counters.unwritten += 1
                self.memory.release(memory_slot)
                continue
            if taken.evicted is not None:
                self.counters.evicted_disk += 1
                taken.evicted.disk_slot = None
                self._lost_a_copy(taken.evicted)
            disk.post_write(block, memory_slot, taken.slot, self.slot_bytes(memory_slot))
            self._line_up()

    def _end_write(self, job: WriteJob) -> None:
        if job.is_good:
            job.block.disk_slot = job.disk_slot
            self.counters.written += 1
        self.memory.release(job.memory_slot)

    def _end_read(self, disk: DiskTier, job: ReadJob) -> None:
        block = job.block
        self._reading.remove(block.block_hash)
        if job.is_good:
            self.counters.read += 1
            self._settle(block, job.memory_slot)
        else:
            self.memory.abandon(job.memory_slot)
            block.is_arriving = False
            if job.error is None and block.disk_slot is not None:
                self.counters.dropped_corrupt += 1
                block.disk_slot = None
                disk.forget_corrupt(block, job.disk_slot)
            self._lost_a_copy(block)

    def _fetch(self, loan: Loan) -> None:
        """Lend what has come to memory, post reads for the next blocks, and end the loan where neither can be."""
        num_reading = 0
        index = loan.num_told
        while index < len(loan.blocks):
            block = loan.blocks[index]
            if index in loan.held:
                index += 1
            elif block.memory_slot is not None:
                self._lend(loan, index, block.memory_slot, came_from_disk=True)
            elif num_reading == WINDOW:
                return
            elif self._read(block):
                num_reading += 1
                index += 1
            else:
                # What the loan holds at its far end may be what there is no memory for.
                self._cut(loan, max([index, *loan.held]))
        if not num_reading:
            self._waiting.remove(loan)

    def _read(self, block: StoredBlock) -> bool:
        """Whether the block is being read from disk now, or will be as soon as the disk has time for it."""
        if block.block_hash in self._reading:
            return True
        if self.disk is None or block.disk_slot is None or not self.disk.is_on:
            return False
        if not self.disk.can_read:
            return True
        slot = self._take_memory(block.tenant)
        if slot is None:
            return False
        block.is_arriving = True
        self.disk.slots.hold(block.disk_slot)
        self._reading.add(block.block_hash)
        self.disk.post_read(block, slot, block.disk_slot, self.slot_bytes(slot))
        return True

    def _lend(self, loan: Loan, index: int, slot: int, *, came_from_disk: bool) -> None:
        self.memory.hold(slot)
        loan.held[index] = LoanedBlock(index, slot, self.memory.generation(slot), came_from_disk)
        loan.on_news()

    def _cut(self, loan: Loan, index: int) -> None:
        """The loan ends before this block."""
        del loan.blocks[index:]
        for beyond in [i for i in loan.held if i >= index]:
            self.memory.release(loan.held.pop(beyond).slot)
        loan.on_news()

    def _give_back(self, loan: Loan) -> None:
        if loan in self._waiting:
            self._waiting.remove(loan)
        for lent in loan.held.values():
            self.memory.release(lent.slot)
        from_disk = sum(1 for lent in loan.held.values() if lent.came_from_disk)
        self.counters.hits_disk += from_disk
        self.counters.hits_memory += len(loan.held) - from_disk
        self.counters.misses += loan.num_asked - len(loan.held)

    def _lose_disk(self, disk: DiskTier) -> None:
        """Nothing that is only there can be had any more."""
        for block in self._unwritten:
            if block.memory_slot is not None:
                self.memory.release(block.memory_slot)
        self._unwritten.clear()
        self._unwritten_later.clear()
        for block in [block for block in self._blocks.values() if block.disk_slot is not None]:
            if block.disk_slot is not None:
                disk.slots.drop(block.disk_slot)
            block.disk_slot = None
            self._lost_a_copy(block)


def _check_tenant(tenant: str) -> None:
    if len(tenant.encode()) > MAX_TENANT_BYTES:
        raise ValueError(f"tenant: at most {MAX_TENANT_BYTES} bytes, not {len(tenant.encode())}")


def _expect(holds: bool, book: str, value: object) -> None:
    if not holds:
        raise AssertionError(f"store: {book} does not add up: {value}")

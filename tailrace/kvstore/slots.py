"""SlotTable: the sole writer of the states of one tier's slots.

Used by one thread. Refusal is a value (None), misuse a ValueError, corruption an AssertionError; each method decides
before it changes anything.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from tailrace.kv.events import Tier
from tailrace.policy.store_eviction import EvictionOrder, Usage

MAX_QUOTAS = 4096
"""Tenants that may have one."""
_COUNT_BITS = 32
_COUNT_MASK = (1 << _COUNT_BITS) - 1


class SlotState(IntEnum):
    FREE = 0
    CACHED = 1
    """Holds a block that nobody reads: it can be given up."""
    LENT = 2
    """Read by a peer, or by the copy to or from the other tier."""
    LANDING = 3
    """The destination of a read in flight."""
    QUARANTINED = 4
    """The destination of a read that stalled: it may still be written at any moment."""


@dataclass(frozen=True, slots=True)
class TierLedger:
    """Number of slots in each state."""

    total: int
    free: int
    cached: int
    lent: int
    landing: int
    quarantined: int

    @property
    def balances(self) -> bool:
        return self.free + self.cached + self.lent + self.landing + self.quarantined == self.total

    def __str__(self) -> str:
        names = ("free", "cached", "lent", "landing", "quarantined")
        return " ".join(f"{name}={getattr(self, name)}" for name in names if getattr(self, name))


@dataclass(slots=True, eq=False)
class StoredBlock:
    """One block that the store has, wherever its copies are. `KvStore` is the only writer."""

    block_hash: bytes
    depth: int
    tenant: str
    moment: int
    """See Usage."""
    uses: int = 1
    num_pins: int = 0
    memory_slot: int | None = None
    disk_slot: int | None = None
    is_arriving: bool = False
    """A read into a memory slot is in flight: from a peer, or from the disk."""
    told: Tier | None = None
    """The tier that others were told last; None: they do not know of it. Written by `StoreNews`."""

    @property
    def tier(self) -> Tier | None:
        """The nearest one that it can be lent from; None: it cannot be."""
        if self.memory_slot is not None:
            return Tier.CPU
        return Tier.NVME if self.disk_slot is not None else None

    @property
    def usage(self) -> Usage:
        return Usage(self.moment, self.uses, self.depth, self.tenant)

    @property
    def is_held(self) -> bool:
        """Something refers to it; else it can be forgotten."""
        return self.memory_slot is not None or self.disk_slot is not None or self.is_arriving


@dataclass(frozen=True, slots=True)
class Taken:
    slot: int
    evicted: StoredBlock | None
    """What the slot held, and nobody finds there any more."""


class SlotTable:
    """Slots are 0 .. num_slots - 1. A tenant holds at most its quota of them, where it has one."""

    def __init__(self, num_slots: int, *, epoch: int = 0) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, not {num_slots}")
        if not 0 <= epoch <= _COUNT_MASK:
            raise ValueError(f"epoch must fit 32 bits, not {epoch}")
        self.num_slots = num_slots
        self.stamps: NDArray[np.uint64] = np.full(num_slots, epoch << _COUNT_BITS, dtype=np.uint64)
        """As BlockPool's: (epoch << 32 | count), count going up each time that the slot is handed out anew."""
        self.quotas: dict[str, int] = {}
        """Slots, by tenant."""
        self._epoch_bits = epoch << _COUNT_BITS
        self._states = [SlotState.FREE] * num_slots
        self._counts = [num_slots] + [0] * (len(SlotState) - 1)
        self._holds = [0] * num_slots
        self._blocks: list[StoredBlock | None] = [None] * num_slots
        self._tenants: list[str | None] = [None] * num_slots
        """On whose quota a slot is, from `take` until it is free again."""
        self._used: Counter[str] = Counter()
        self._free = list(range(num_slots - 1, -1, -1))
        self._order = EvictionOrder(num_slots)

    def __repr__(self) -> str:
        return f"<SlotTable {self.num_slots}: {self.ledger()}>"

    # -- what is there ------------------------------------------------------------------------------------------------

    @property
    def num_available(self) -> int:
        return len(self._free) + len(self._order)

    def room_for(self, tenant: str, *, beside: Sequence[int | None] = ()) -> int:
        """Slots that `take` could still give to this tenant for the rest of a chain.

        `beside`: those of its beginning that is nowhere else. Pushed out by its end, it would leave that of no use.
        """
        num_kept = sum(1 for slot in beside if slot in self._order)
        room, quota = self.num_available, self.quotas.get(tenant)
        if quota is not None:
            room = min(room, max(0, quota - self._used[tenant]) + self._order.num_of(tenant))
        return max(0, room - num_kept)

    def state(self, slot: int) -> SlotState:
        return self._states[self._known(slot)]

    def generation(self, slot: int) -> int:
        return int(self.stamps[self._known(slot)])

    def num_used(self, tenant: str) -> int:
        return self._used[tenant]

    def tenants(self) -> dict[str, int]:
        """Slots of each that has any."""
        return dict(self._used)

    def takes_quota(self, tenant: str) -> bool:
        return tenant in self.quotas or len(self.quotas) < MAX_QUOTAS

    def set_quota(self, tenant: str, limit: int | None) -> None:
        """None: none. Raises ValueError for one more than MAX_QUOTAS."""
        if limit is None:
            self.quotas.pop(tenant, None)
            self._order.put_back(tenant)
        elif self.takes_quota(tenant):
            self.quotas[tenant] = limit
            self._order.set_apart(tenant)
        else:
            raise ValueError(f"at most {MAX_QUOTAS} tenants may have a quota")

    def blocks(self) -> dict[int, StoredBlock]:
        """What can be found, by slot."""
        return {slot: block for slot, block in enumerate(self._blocks) if block is not None}

    def ledger(self) -> TierLedger:
        free, cached, lent, landing, quarantined = self._counts
        return TierLedger(self.num_slots, free, cached, lent, landing, quarantined)

    def restore(self, blocks: Mapping[int, StoredBlock]) -> None:
        """What was found in the slots when the tier was opened. Raises ValueError for a table that was used before."""
        if self._counts[SlotState.FREE] != self.num_slots:
            raise ValueError("a table is restored before it is used")
        self._free = [slot for slot in self._free if slot not in blocks] + sorted(blocks)
        for slot, block in sorted(blocks.items(), reverse=True):
            self._hand_out(slot, block.tenant, None)
            self.landed(slot, block)

    # -- slots that something is read into ----------------------------------------------------------------------------

    def take(self, tenant: str) -> Taken | None:
        """A landing slot: a free one, else the one whose block is worth least; None where there is none."""
        quota = self.quotas.get(tenant)
        is_full = quota is not None and self._used[tenant] >= quota
        if self._free and not is_full:
            return self._hand_out(self._free[-1], tenant, None)
        slot = self._order.victim(tenant if is_full else None)
        if slot is None:
            return None
        evicted = self._blocks[slot]
        self.drop(slot)
        return self._hand_out(slot, tenant, evicted)

    def landed(self, slot: int, block: StoredBlock) -> None:
        self._require(slot, (SlotState.LANDING, SlotState.QUARANTINED), "land")
        self._blocks[slot] = block
        self._move(slot, SlotState.CACHED)

    def abandon(self, slot: int) -> None:
        """The read has ended, so nothing can land any more, and nobody wants what it brought."""
        self._require(slot, (SlotState.LANDING, SlotState.QUARANTINED), "abandon")
        self._move(slot, SlotState.FREE)

    def quarantine(self, slot: int) -> None:
        self._require(slot, (SlotState.LANDING,), "quarantine")
        self._move(slot, SlotState.QUARANTINED)

    # -- slots that something is read from ----------------------------------------------------------------------------

    def hold(self, slot: int) -> None:
        self._require(slot, (SlotState.CACHED, SlotState.LENT), "hold")
        self._holds[slot] += 1
        self._move(slot, SlotState.LENT)

    def release(self, slot: int) -> None:
        self._require(slot, (SlotState.LENT,), "release")
        self._holds[slot] -= 1
        self._settle(slot)

    # -- blocks -------------------------------------------------------------------------------------------------------

    def drop(self, slot: int) -> None:
        """The block is no longer to be found here; the slot is free as soon as nobody reads it."""
        self._require(slot, (SlotState.CACHED, SlotState.LENT), "drop")
        self._blocks[slot] = None
        self._settle(slot)

    def update(self, slot: int) -> None:
        """The usage or the pins of the block in this slot have changed."""
        if self._states[slot] is SlotState.CACHED:
            self._rank(slot)

    def check_integrity(self) -> None:
        """Recomputes every book from the others, O(num_slots). Raises AssertionError where they disagree."""
        found = Counter(self._states)
        _expect([found[state] for state in SlotState] == self._counts, "counts", self._counts)
        _expect(self.ledger().balances, "ledger", self.ledger())
        members: dict[SlotState, list[int]] = {state: [] for state in SlotState}
        for slot, state in enumerate(self._states):
            members[state].append(slot)
            _expect((state is SlotState.FREE) == (self._tenants[slot] is None), "tenant of slot", slot)
            _expect((state is SlotState.LENT) == (self._holds[slot] > 0), "holds of slot", slot)
            _expect(state is not SlotState.CACHED or self._blocks[slot] is not None, "block of slot", slot)
            _expect(self.generation(slot) >> _COUNT_BITS == self._epoch_bits >> _COUNT_BITS, "epoch of slot", slot)
        _expect(sorted(self._free) == members[SlotState.FREE], "list of free slots", self._free)
        evictable = [slot for slot in members[SlotState.CACHED] if not self._is_pinned(slot)]
        _expect(sorted(self._order.slots()) == evictable, "order of eviction", self._order.slots())
        used = Counter(tenant for tenant in self._tenants if tenant is not None)
        _expect(used == self._used, "slots by tenant", self._used)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _hand_out(self, slot: int, tenant: str, evicted: StoredBlock | None) -> Taken:
        # Before anyone can write the slot: whoever still reads what it held must see another generation.
        self.stamps[slot] = self._epoch_bits | ((self.generation(slot) + 1) & _COUNT_MASK)
        self._move(slot, SlotState.LANDING)
        self._tenants[slot] = tenant
        self._used[tenant] += 1
        return Taken(slot, evicted)

    def _settle(self, slot: int) -> None:
        if self._holds[slot]:
            self._move(slot, SlotState.LENT)
        else:
            self._move(slot, SlotState.FREE if self._blocks[slot] is None else SlotState.CACHED)

    def _move(self, slot: int, state: SlotState) -> None:
        """The only writer of states, and so of the counts and of both lists."""
        was = self._states[slot]
        if was is state:
            return
        self._states[slot] = state
        self._counts[was] -= 1
        self._counts[state] += 1
        if was is SlotState.FREE:
            # Only ever taken from the top.
            self._free.pop()
        elif was is SlotState.CACHED:
            self._order.remove(slot)
        if state is SlotState.FREE:
            self._free.append(slot)
            self._forget_tenant(slot)
        elif state is SlotState.CACHED:
            self._rank(slot)

    def _forget_tenant(self, slot: int) -> None:
        tenant = self._tenants[slot] or ""
        self._tenants[slot] = None
        self._used[tenant] -= 1
        if not self._used[tenant]:
            # Names come from outside: one that has nothing here any more leaves nothing.
            del self._used[tenant]

    def _rank(self, slot: int) -> None:
        block = self._blocks[slot]
        if block is None or block.num_pins:
            self._order.remove(slot)
        else:
            self._order.add(slot, block.usage)

    def _is_pinned(self, slot: int) -> bool:
        block = self._blocks[slot]
        return block is not None and block.num_pins > 0

    def _known(self, slot: int) -> int:
        if not 0 <= slot < self.num_slots:
            raise ValueError(f"slot {slot} is not one of 0 to {self.num_slots - 1}")
        return slot

    def _require(self, slot: int, states: tuple[SlotState, ...], verb: str) -> None:
        if self._states[self._known(slot)] not in states:
            raise ValueError(f"cannot {verb} slot {slot}: it is {self._states[slot].name.lower()}")


def _expect(holds: bool, book: str, value: object) -> None:
    if not holds:
        raise AssertionError(f"slot table: {book} does not add up: {value}")

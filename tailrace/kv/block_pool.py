"""BlockPool: the sole writer of reference counts and states of a worker's KV blocks.

Used by one thread, the engine's. Refusal is a value (None), misuse a ValueError, corruption an AssertionError;
each method decides before it changes anything, so a call that raises or returns None has done nothing.
Every operation is O(1) a block.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from tailrace.kv.events import KVEvent, KVEventKind

__all__ = ["BlockPool", "BlockState", "KVEvent", "KVEventKind", "Ledger"]

_COUNT_BITS = 32
_COUNT_MASK = (1 << _COUNT_BITS) - 1


class BlockState(IntEnum):
    """A block is in exactly one; where several would fit, the highest one names it."""

    FREE = 0
    CACHED = 1
    """Registered, held by nobody: findable and evictable."""
    LOANED = 2
    """Held by revocable loans only: handed out when there is no other block."""
    LENT = 3
    """Held by peers' reads only."""
    ACTIVE = 4
    """Referred to by sequences of this worker, and perhaps lent as well."""
    QUARANTINED = 5
    """The destination of a read that stalled: it may still be written at any moment."""
    LANDING = 6
    """The destination of a read in flight."""


_HELD = frozenset({BlockState.ACTIVE, BlockState.LENT, BlockState.LOANED, BlockState.CACHED})
_ACTIVE = frozenset({BlockState.ACTIVE})
_LANDING = frozenset({BlockState.LANDING})
_ARRIVING = frozenset({BlockState.LANDING, BlockState.QUARANTINED})


@dataclass(frozen=True, slots=True)
class Ledger:
    """Number of blocks in each state."""

    total: int
    free: int
    active: int
    cached: int
    lent: int
    landing: int
    quarantined: int

    @property
    def balances(self) -> bool:
        return self.free + self.active + self.cached + self.lent + self.landing + self.quarantined == self.total

    def __str__(self) -> str:
        names = ("free", "active", "cached", "lent", "landing", "quarantined")
        return " ".join(f"{name}={getattr(self, name)}" for name in names if getattr(self, name))


@dataclass(slots=True, eq=False)
class RevocableLoan:
    """Blocks that a peer may read until the loan is ended, by whoever made it or by the pool. The pool alone writes it.

    The generation of a block goes up before anyone writes it, so a read that comes after a revocation is found out.
    """

    blocks: tuple[int, ...]
    on_revoked: Callable[[], None]
    """Called once, in the middle of an allocation, when the pool ends the loan."""
    is_over: bool = False


class BlockPool:
    """Block ids are 0 .. num_blocks - 1. A call names a block at most once.

    Take a prefix before allocating the rest: `find_prefix` holds nothing, and `allocate` may evict what it found.

    >>> pool.acquire(prefix := pool.find_prefix(hashes))
    >>> rest = pool.allocate(needed - len(prefix))      # None: release the prefix and wait
    """

    def __init__(self, num_blocks: int, *, epoch: int, prefix_caching: bool = True) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, not {num_blocks}")
        if not 0 <= epoch <= _COUNT_MASK:
            raise ValueError(f"epoch must fit 32 bits, not {epoch}")
        self.num_blocks = num_blocks
        self.stamps: NDArray[np.uint64] = np.full(num_blocks, epoch << _COUNT_BITS, dtype=np.uint64)
        """One generation a block, (epoch << 32 | count), count going up each time the block is handed out anew."""
        self._generations = self.stamps.data
        self._epoch_bits = epoch << _COUNT_BITS
        self._prefix_caching = prefix_caching
        self._states = [BlockState.FREE] * num_blocks
        self._counts = [num_blocks] + [0] * (len(BlockState) - 1)
        self._references = [0] * num_blocks
        self._lends = [0] * num_blocks
        self._loans = [0] * num_blocks
        self._open_loans: dict[RevocableLoan, None] = {}
        """The oldest first."""
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._parents = [b""] * num_blocks
        """Hash of the block before it in its chain; empty: it is the first. Of registered blocks."""
        self._tenants = [""] * num_blocks
        """A reference each to a name that a chain's blocks share, so that what tenants leave is bounded by the pool."""
        self._by_hash: dict[bytes, int] = {}
        # A stack: a block that was just freed is warm in the caches, one never used may not even have memory yet.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        """Cached blocks, the first to be evicted first."""
        self.num_taken = 0
        """Blocks handed out so far."""
        self._events: list[KVEvent] = []

    def __repr__(self) -> str:
        return f"<BlockPool {self.num_blocks}: {self.ledger()}>"

    # -- what is there ------------------------------------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_available(self) -> int:
        """What `allocate` can still give: free and cached blocks, and those on revocable loans only."""
        return len(self._free) + len(self._evictable) + self._counts[BlockState.LOANED]

    def find_prefix(self, hashes: Sequence[bytes]) -> list[int]:
        """Blocks of the longest registered prefix. Changes nothing, not even the order of eviction."""
        blocks: list[int] = []
        for block_hash in hashes:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def find_each(self, hashes: Sequence[bytes]) -> list[int | None]:
        """As `find_prefix`, of each hash by itself."""
        return [self._by_hash.get(block_hash) for block_hash in hashes]

    def next_evicted(self, count: int) -> list[int]:
        """The first `count` cached blocks in the order in which they would be evicted now."""
        return list(islice(self._evictable, max(0, count)))

    def chain_of(self, block: int, *, whole: bool = True) -> list[bytes]:
        """Hashes from the first block of its chain to this one; empty when it or one before it is not findable.

        Not `whole`: then from the one behind that. O(its depth).
        """
        chain: list[bytes] = []
        at: int | None = self._known(block)
        while at is not None and (own := self._hashes[at]) is not None:
            chain.append(own)
            if not self._parents[at]:
                return chain[::-1]
            at = self._by_hash.get(self._parents[at])
        return [] if whole else chain[::-1]

    def parent_of(self, block: int) -> bytes:
        """Of a registered block, the hash of the one before it in its chain; empty where it is the first."""
        return self._parents[self._known(block)]

    def tenant_of(self, block: int) -> str:
        """Whom the block was registered for; of one that is not registered, empty."""
        return self._tenants[self._known(block)]

    def generation(self, block: int) -> int:
        return self._generations[self._known(block)]

    def state(self, block: int) -> BlockState:
        return self._states[self._known(block)]

    def num_references(self, block: int) -> int:
        return self._references[self._known(block)]

    def num_lends(self, block: int) -> int:
        return self._lends[self._known(block)]

    def hash_of(self, block: int) -> bytes | None:
        """The hash under which the block is findable; None when it is not."""
        return self._hashes[self._known(block)]

    def cached_hashes(self) -> list[bytes]:
        """Every findable hash, whoever holds its block. Events not drained yet may repeat what it says."""
        return list(self._by_hash)

    # -- sequences of this worker -------------------------------------------------------------------------------------

    def allocate(self, count: int) -> list[int] | None:
        """`count` active blocks with one reference each: free ones first, then the least recently used cached ones.

        Where these are too few, loans are revoked, the oldest first.
        """
        blocks = self._take(count, BlockState.ACTIVE)
        for block in blocks or ():
            self._references[block] = 1
        return blocks

    def acquire(self, blocks: Sequence[int]) -> None:
        """One more reference on blocks that are active, cached or lent."""
        self._require(blocks, _HELD, "acquire")
        for block in blocks:
            self._references[block] += 1
            self._move(block, BlockState.ACTIVE)

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less, `blocks` in the order of the sequence: its tail becomes evictable before its head."""
        self._require(blocks, _ACTIVE, "release")
        for block in reversed(blocks):
            self._references[block] -= 1
            self._settle(block)

    def register(self, block: int, block_hash: bytes, parent: bytes = b"", tenant: str = "") -> None:
        """The block is completely written, and findable from now on. `parent`: hash of the one before it in its chain.

        Two sequences may compute the same block at the same time: the first one registered stays the one to find.
        """
        self._require((block,), _HELD, "register")
        own = self._hashes[block]
        if own is not None and own != block_hash:
            raise ValueError(f"block {block} is registered under another hash")
        if self._prefix_caching and block_hash not in self._by_hash:
            self._hashes[block] = block_hash
            self._parents[block] = parent
            self._tenants[block] = tenant
            self._by_hash[block_hash] = block
            self._events.append(KVEvent(KVEventKind.PUBLISH, block_hash))

    # -- blocks that peers read ---------------------------------------------------------------------------------------

    def lend(self, blocks: Sequence[int]) -> None:
        """One more lend on blocks that are active, cached or lent: they are not handed out again before it ends."""
        self._require(blocks, _HELD, "lend")
        for block in blocks:
            self._lends[block] += 1
            self._settle(block)

    def unlend(self, blocks: Sequence[int]) -> None:
        """One lend less, `blocks` in the order of the sequence."""
        self._require(blocks, _HELD, "unlend")
        for block in blocks:
            if not self._lends[block]:
                raise ValueError(f"cannot unlend block {block}: it is not lent")
        for block in reversed(blocks):
            self._lends[block] -= 1
            self._settle(block)

    def lend_revocably(self, blocks: Sequence[int], on_revoked: Callable[[], None]) -> RevocableLoan:
        """As `lend`, but sequences of this worker come first."""
        self._require(blocks, _HELD, "lend")
        for block in blocks:
            if self._hashes[block] is None:
                raise ValueError(f"cannot lend block {block} revocably: it is not registered")
        loan = RevocableLoan(tuple(blocks), on_revoked)
        self._open_loans[loan] = None
        for block in blocks:
            self._loans[block] += 1
            self._settle(block)
        return loan

    def end_loan(self, loan: RevocableLoan) -> None:
        """Nobody reads its blocks any more. Idempotent; one that was revoked has ended already."""
        if loan.is_over:
            return
        loan.is_over = True
        del self._open_loans[loan]
        for block in reversed(loan.blocks):
            self._loans[block] -= 1
            self._settle(block)

    # -- blocks that a read writes ------------------------------------------------------------------------------------

    def allocate_landing(self, count: int) -> list[int] | None:
        """Destinations of a read: as `allocate`, but nobody's until the read is known to have ended."""
        return self._take(count, BlockState.LANDING)

    def landed(self, blocks: Sequence[int]) -> None:
        """The read said DONE: landing or quarantined blocks become active with one reference."""
        self._require(blocks, _ARRIVING, "land")
        for block in blocks:
            self._references[block] = 1
            self._move(block, BlockState.ACTIVE)

    def abandon_landing(self, blocks: Sequence[int]) -> None:
        """The read ended, so nothing can land any more, and nobody wants what it brought."""
        self._require(blocks, _ARRIVING, "abandon")
        for block in reversed(blocks):
            self._settle(block)

    def quarantine(self, blocks: Sequence[int]) -> None:
        """The read stalled: its destinations are kept apart until it says DONE or ERR."""
        self._require(blocks, _LANDING, "quarantine")
        for block in blocks:
            self._move(block, BlockState.QUARANTINED)

    # -- books --------------------------------------------------------------------------------------------------------

    def drain_events(self) -> list[KVEvent]:
        """Every change of what is findable since the last drain, in order. To be called each step: they pile up.

        A hash that came and went in between is mentioned twice: whoever took a snapshot in the middle needs the second.
        """
        events, self._events = self._events, []
        return events

    def ledger(self) -> Ledger:
        free, cached, loaned, lent, active, quarantined, landing = self._counts
        return Ledger(self.num_blocks, free, active, cached, loaned + lent, landing, quarantined)

    def check_integrity(self) -> None:
        """Recomputes every book from the others, O(num_blocks). Raises AssertionError where they disagree."""
        found = Counter(self._states)
        _expect([found[state] for state in BlockState] == self._counts, "counts", self._counts)
        _expect(self.ledger().balances, "ledger", self.ledger())
        for block, state in enumerate(self._states):
            _expect(state is self._derived(block), f"state of block {block}", state.name)
            _expect(self.generation(block) >> _COUNT_BITS == self._epoch_bits >> _COUNT_BITS, "epoch of block", block)
        by_state = {BlockState.FREE: self._free, BlockState.CACHED: list(self._evictable)}
        for state, listed in by_state.items():
            members = [block for block, was in enumerate(self._states) if was is state]
            _expect(sorted(listed) == members, f"list of {state.name} blocks", listed)
        loans = Counter(block for loan in self._open_loans for block in loan.blocks)
        _expect([loans[block] for block in range(self.num_blocks)] == self._loans, "loans", len(self._open_loans))
        registered = {own: block for block, own in enumerate(self._hashes) if own is not None}
        _expect(registered == self._by_hash, "registered hashes", len(self._by_hash))

    # -- inside -------------------------------------------------------------------------------------------------------

    def _take(self, count: int, state: BlockState) -> list[int] | None:
        if count < 0:
            raise ValueError(f"count must not be negative, not {count}")
        if count > self.num_available:
            return None
        self.num_taken += count
        blocks: list[int] = []
        for _ in range(count):
            block = self._free[-1] if self._free else self._evict()
            # Before anyone can write the block: whoever still reads what it held must see another generation.
            self._bump(block)
            self._move(block, state)
            blocks.append(block)
        return blocks

    def _evict(self) -> int:
        """Frees the least recently used cached block; revokes loans where there is none."""
        while not self._evictable:
            self._revoke_one()
        block = next(iter(self._evictable))
        block_hash = self._hashes[block]
        if block_hash is None:
            raise AssertionError(f"cached block {block} has no hash")
        self._hashes[block] = None
        self._tenants[block] = ""
        del self._by_hash[block_hash]
        self._events.append(KVEvent(KVEventKind.RETRACT, block_hash))
        self._move(block, BlockState.FREE)
        return block

    def _revoke_one(self) -> None:
        """Ends the oldest loan that keeps a block from being handed out. There is one: `num_available` counts them."""
        loan = next(loan for loan in self._open_loans if any(self._states[b] is BlockState.LOANED for b in loan.blocks))
        self.end_loan(loan)
        loan.on_revoked()

    def _bump(self, block: int) -> None:
        # Wraps inside its own half: the epoch must stay readable.
        self._generations[block] = self._epoch_bits | ((self._generations[block] + 1) & _COUNT_MASK)

    def _settle(self, block: int) -> None:
        """Puts a block that no read writes where its references, lends and hash say."""
        if self._references[block]:
            self._move(block, BlockState.ACTIVE)
        elif self._lends[block]:
            self._move(block, BlockState.LENT)
        elif self._loans[block]:
            self._move(block, BlockState.LOANED)
        else:
            self._move(block, BlockState.FREE if self._hashes[block] is None else BlockState.CACHED)

    def _move(self, block: int, state: BlockState) -> None:
        """The only writer of states, and so of the counts and of both lists."""
        was = self._states[block]
        if was is state:
            return
        self._states[block] = state
        self._counts[was] -= 1
        self._counts[state] += 1
        if was is BlockState.FREE:
            # Only ever taken from the top.
            self._free.pop()
        elif was is BlockState.CACHED:
            del self._evictable[block]
        if state is BlockState.FREE:
            self._free.append(block)
        elif state is BlockState.CACHED:
            self._evictable[block] = None

    def _derived(self, block: int) -> BlockState:
        """What the state must be, by the other books."""
        if self._states[block] in _ARRIVING:
            held = (
                self._references[block] or self._lends[block] or self._loans[block] or self._hashes[block] is not None
            )
            return BlockState.ACTIVE if held else self._states[block]
        if self._references[block]:
            return BlockState.ACTIVE
        if self._lends[block]:
            return BlockState.LENT
        if self._loans[block]:
            return BlockState.LOANED
        return BlockState.FREE if self._hashes[block] is None else BlockState.CACHED

    def _known(self, block: int) -> int:
        if not 0 <= block < self.num_blocks:
            raise ValueError(f"block {block} is not one of 0 to {self.num_blocks - 1}")
        return block

    def _require(self, blocks: Collection[int], states: Iterable[BlockState], verb: str) -> None:
        if len(set(blocks)) != len(blocks):
            raise ValueError(f"cannot {verb} a block twice in one call")
        for block in blocks:
            if self._states[self._known(block)] not in states:
                raise ValueError(f"cannot {verb} block {block}: it is {self._states[block].name.lower()}")


def _expect(holds: bool, book: str, value: object) -> None:
    if not holds:
        raise AssertionError(f"block pool: {book} does not add up: {value}")

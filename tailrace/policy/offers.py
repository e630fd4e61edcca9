"""Which cached chains a worker offers to its store, and when.

A chain is offered when the sequence that it belongs to is over or gives way. What was never offered is looked for when
free blocks fall below a mark: of the cached blocks that would be evicted next, those that are new to the store, each
with all that is before it in its chain, because a store keeps blocks by their depth.

With a window that is offered which can be gone on from: the window before the end of a sequence, and before the place
where it went on from what it found, as others may do. What it has let go of is not.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from tailrace.kv.block_pool import BlockPool

MAX_AHEAD = 1024
"""Blocks that one look goes through at most, whatever the pool's size: it costs some tenths of a millisecond."""


@dataclass(frozen=True, slots=True)
class CachedChain:
    """Blocks of one tenant, by their hashes from the first one of a chain on; with a window, a part of a chain."""

    hashes: Sequence[bytes]
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class _Over:
    """A chain on which nobody computes any more. `num_found`: leading blocks of it that were not computed."""

    chain: CachedChain
    num_found: int


class OfferPolicy:
    """Reads the pool and changes nothing in it. A block counts as offered until it holds something else.

    Looks are rare: after one, half of what it went through can be handed out before another is due.
    """

    def __init__(self, pool: BlockPool, *, low_water: float, span: int = 0) -> None:
        """`low_water`: share of the pool; 0: only chains that are over are offered. `span`: see Window."""
        self._pool = pool
        self._span = span
        self._mark = min(MAX_AHEAD, ceil(low_water * pool.num_blocks))
        self._offered = array("Q", bytes(8 * pool.num_blocks))
        """The generation that a block had when it was offered last."""
        self._over: list[_Over] = []
        self._next_look = 0

    def note_over(self, chain: Sequence[bytes], tenant: str, num_found: int = 0) -> None:
        """Nobody here computes on this chain of blocks any more. `num_found`: with so many of them it began."""
        if chain:
            self._over.append(_Over(CachedChain(chain, tenant), num_found))

    def pass_over(self, blocks: Sequence[int]) -> None:
        """A sequence has let go of them and goes on: for low water they are not offered."""
        for block in blocks:
            self._offered[block] = self._pool.generation(block)

    def due(self) -> list[CachedChain]:
        """Chains to offer now, as far as they are cached. To be called each step.

        What is over is offered even if it was before: so the store knows what is in use.
        """
        over, self._over = self._over, []
        kept = [chain for each in over for chain in self._kept(each)]
        ahead = self._ahead() if self._is_low() else []
        return [*ahead, *(chain for chain in kept if chain.hashes)]

    def _kept(self, over: _Over) -> list[CachedChain]:
        hashes, tenant = over.chain.hashes, over.chain.tenant
        if not self._span:
            return [CachedChain(hashes[: self._mark_offered(hashes)], tenant)]
        blocks = self._pool.find_each(hashes)
        self.pass_over([block for block in blocks if block is not None])
        # One block more: who asks for just these tokens computes the last one again.
        first, end = len(hashes) - self._span - 1, len(hashes)
        began = range(over.num_found - self._span, over.num_found)
        pieces = [began, range(first, end)] if began.stop < first else [range(min(first, began.start), end)]
        return [CachedChain(_cached_end(hashes, blocks, piece), tenant) for piece in pieces]

    def _is_low(self) -> bool:
        return self._pool.num_free < self._mark and self._pool.num_taken >= self._next_look

    def _ahead(self) -> list[CachedChain]:
        self._next_look = self._pool.num_taken + max(1, self._mark // 2)
        chains: list[CachedChain] = []
        num_walked = 0
        for block in self._looked_at():
            if self._offered[block] == self._pool.generation(block):
                continue
            if num_walked >= MAX_AHEAD:
                self._next_look = self._pool.num_taken
                break
            chain = self._pool.chain_of(block, whole=not self._span)
            # A block whose chain is broken can be reached by nobody: it need not be looked at again.
            self._offered[block] = self._pool.generation(block)
            self._mark_offered(chain)
            num_walked += len(chain)
            if chain:
                chains.append(CachedChain(chain[-self._span :], self._pool.tenant_of(block)))
        return chains

    def _looked_at(self) -> list[int]:
        """What would be evicted next; with a window, without what is before another of them in its chain."""
        blocks = self._pool.next_evicted(self._mark - self._pool.num_free)
        if not self._span:
            return blocks
        parents = {self._pool.parent_of(block) for block in blocks}
        return [block for block in blocks if self._pool.hash_of(block) not in parents]

    def _mark_offered(self, chain: Sequence[bytes]) -> int:
        """How many of them are cached, from the first on."""
        blocks = self._pool.find_prefix(chain)
        self.pass_over(blocks)
        return len(blocks)


def _cached_end(hashes: Sequence[bytes], blocks: Sequence[int | None], piece: range) -> Sequence[bytes]:
    """Of a part of a chain, what is cached without a hole up to its end."""
    first = piece.stop
    while first > max(0, piece.start) and blocks[first - 1] is not None:
        first -= 1
    return hashes[first : piece.stop]

"""Which cached chains a worker offers to its store, and when.

A chain is offered when the sequence that it belongs to is over or gives way. What was never offered is looked for when
free blocks fall below a mark: of the cached blocks that would be evicted next, those that are new to the store, each
with all that is before it in its chain, because a store keeps blocks by their depth.
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
    """Blocks of one tenant, by their hashes from the first one of a chain on."""

    hashes: Sequence[bytes]
    tenant: str = ""


class OfferPolicy:
    """Reads the pool and changes nothing in it. A block counts as offered until it holds something else.

    Looks are rare: after one, half of what it went through can be handed out before another is due.
    """

    def __init__(self, pool: BlockPool, *, low_water: float) -> None:
        """`low_water`: share of the pool; 0: only chains that are over are offered."""
        self._pool = pool
        self._mark = min(MAX_AHEAD, ceil(low_water * pool.num_blocks))
        self._offered = array("Q", bytes(8 * pool.num_blocks))
        """The generation that a block had when it was offered last."""
        self._over: list[CachedChain] = []
        self._next_look = 0

    def note_over(self, chain: Sequence[bytes], tenant: str) -> None:
        """Nobody here computes on this chain of blocks any more."""
        if chain:
            self._over.append(CachedChain(chain, tenant))

    def due(self) -> list[CachedChain]:
        """Chains to offer now, each from its first block on, as far as they are cached. To be called each step.

        What is over is offered even if it was before: so the store knows what is in use.
        """
        over, self._over = self._over, []
        kept = [CachedChain(chain.hashes[: self._mark_offered(chain.hashes)], chain.tenant) for chain in over]
        ahead = self._ahead() if self._is_low() else []
        return [*ahead, *(chain for chain in kept if chain.hashes)]

    def _is_low(self) -> bool:
        return self._pool.num_free < self._mark and self._pool.num_taken >= self._next_look

    def _ahead(self) -> list[CachedChain]:
        self._next_look = self._pool.num_taken + max(1, self._mark // 2)
        chains: list[CachedChain] = []
        num_walked = 0
        for block in self._pool.next_evicted(self._mark - self._pool.num_free):
            if self._offered[block] == self._pool.generation(block):
                continue
            if num_walked >= MAX_AHEAD:
                self._next_look = self._pool.num_taken
                break
            chain = self._pool.chain_of(block)
            # A block whose chain is broken can be reached by nobody: it need not be looked at again.
            self._offered[block] = self._pool.generation(block)
            self._mark_offered(chain)
            num_walked += len(chain)
            if chain:
                chains.append(CachedChain(chain, self._pool.tenant_of(block)))
        return chains

    def _mark_offered(self, chain: Sequence[bytes]) -> int:
        """How many of them are cached, from the first on."""
        blocks = self._pool.find_prefix(chain)
        for block in blocks:
            self._offered[block] = self._pool.generation(block)
        return len(blocks)

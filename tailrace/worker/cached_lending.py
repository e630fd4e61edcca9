"""The owner's side of `Lend` for cached blocks, which a needer names by their hashes: a store, or another worker.

What is lent cannot be given to a sequence, so it is little and not for long: at most a tenth of the pool at a time, and
each loan ends after some seconds whatever its needer does. A read that comes later is caught by the blocks' stamps.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Protocol, TypeVar

from tailrace.errors import OverloadedError
from tailrace.kv.block_pool import BlockPool
from tailrace.messages import LendDone, LendTerms, LentBlocks

POOL_SHARE = 10
"""At most one block of the pool in so many is lent by hash at a time."""
MAX_LOAN_S = 10.0
T = TypeVar("T")


class PoolThread(Protocol):
    """The thread that the pool lives on."""

    def post(self, function: Callable[..., object], *args: object) -> None: ...

    async def call(self, function: Callable[..., T], *args: object) -> T: ...


class CachedLender:
    """Event loop only; the pool is touched on its own thread."""

    def __init__(self, pool: BlockPool, thread: PoolThread, *, block_bytes: int, pool_address: int) -> None:
        """`pool_address`: of the first byte of block 0."""
        self._pool = pool
        self._thread = thread
        self._block_bytes = block_bytes
        self._pool_address = pool_address
        self._num_lent = 0
        """Blocks lent by hash; changed on the pool's thread only."""

    async def lend(self, terms: LendTerms) -> AsyncGenerator[LentBlocks | LendDone, None]:
        """The longest prefix of what is asked that is cached, as far as the share goes. Closing the iterator ends it.

        Raises OverloadedError when the loan is over while the needer still holds it.
        """
        taking = asyncio.ensure_future(self._thread.call(self._take, terms.block_hashes))
        try:
            lent = await asyncio.shield(taking)
            yield lent
            yield LendDone((), last_block_tokens=0, cached_tokens=0, queue_s=0.0, prefill_s=0.0)
            await asyncio.sleep(MAX_LOAN_S)
            raise OverloadedError(f"a loan of cached blocks ends after {MAX_LOAN_S:g} s")
        finally:
            # The pool's thread takes the blocks whether or not anybody still waits for it.
            taking.add_done_callback(self._give_back)

    def _give_back(self, taking: "asyncio.Future[LentBlocks]") -> None:
        if not taking.cancelled() and taking.exception() is None:
            self._thread.post(self._untake, taking.result().blocks)

    def _take(self, hashes: Sequence[bytes]) -> LentBlocks:
        room = max(1, self._pool.num_blocks // POOL_SHARE) - self._num_lent
        blocks = self._pool.find_prefix(hashes[: max(0, room)])
        self._pool.lend(blocks)
        self._num_lent += len(blocks)
        addresses = [self._pool_address + block * self._block_bytes for block in blocks]
        return LentBlocks(0, blocks, addresses, [self._pool.generation(block) for block in blocks])

    def _untake(self, blocks: list[int]) -> None:
        self._pool.unlend(blocks)
        self._num_lent -= len(blocks)

"""The owner's side of `Lend` for cached blocks, which a needer names by their hashes: a store, or another worker.

Loans are revocable: a sequence that needs the blocks gets them at once, the needer's stream is closed, and a read that
comes later is caught by the blocks' stamps. They are also little and not for long, so that what is lent can be evicted
in its turn: at most a tenth of the pool at a time, and each loan ends after some seconds whatever its needer does. A
needer that was lent less than there is may ask for the rest when it has given that back.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from tailrace.errors import OverloadedError
from tailrace.kv.block_pool import BlockPool, RevocableLoan
from tailrace.messages import Holding, HoldingState, LendDone, LendTerms, LentBlocks

POOL_SHARE = 10
"""At most one block of the pool in so many is lent by hash at a time."""
MAX_LOAN_S = 10.0
T = TypeVar("T")


class PoolThread(Protocol):
    """The thread that the pool lives on."""

    def post(self, function: Callable[..., object], *args: object) -> None: ...

    async def call(self, function: Callable[..., T], *args: object) -> T: ...


@dataclass(frozen=True, slots=True)
class _Terms:
    """For the ledger: who holds it since when."""

    needer_id: str
    since: float


@dataclass(frozen=True, slots=True)
class _Loan:
    loan: RevocableLoan
    generations: list[int]
    """Of its blocks, when it was made."""
    num_found: int
    """Blocks of what was asked that are there, lent or not."""


class CachedLender:
    """Event loop only; the pool is touched on its own thread."""

    def __init__(
        self, pool: BlockPool, thread: PoolThread, *, block_bytes: int, block_tokens: int, pool_address: int
    ) -> None:
        """`pool_address`: of the first byte of block 0."""
        self._pool = pool
        self._thread = thread
        self._block_bytes = block_bytes
        self._block_tokens = block_tokens
        self._pool_address = pool_address
        self._open: dict[RevocableLoan, _Terms] = {}
        """Changed on the pool's thread only."""

    async def lend(self, terms: LendTerms) -> AsyncGenerator[LentBlocks | LendDone, None]:
        """The longest prefix of what is asked that is cached, as far as the share goes. Closing the iterator ends it.

        `cached_tokens` of what ends it counts the whole prefix.
        Raises OverloadedError when the loan is over while the needer still holds it.
        """
        revoked = asyncio.Event()
        tell = partial(_set_from_thread, asyncio.get_running_loop(), revoked)
        taking = asyncio.ensure_future(self._thread.call(self._take, terms, tell))
        try:
            taken = await asyncio.shield(taking)
            yield self._lent(taken)
            tokens = taken.num_found * self._block_tokens
            yield LendDone((), last_block_tokens=0, cached_tokens=tokens, queue_s=0.0, prefill_s=0.0)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(MAX_LOAN_S):
                    await revoked.wait()
                raise OverloadedError("the loan of cached blocks is revoked: a request needs them")
            raise OverloadedError(f"a loan of cached blocks ends after {MAX_LOAN_S:g} s")
        finally:
            # The pool's thread takes the blocks whether or not anybody still waits for it.
            taking.add_done_callback(self._give_back)

    def holdings(self) -> list[Holding]:
        """What is lent by hash, and to whom. On the pool's thread."""
        now = time.monotonic()
        return [
            Holding(terms.needer_id, HoldingState.LENT, loan.blocks, now - terms.since)
            for loan, terms in self._open.items()
            if not loan.is_over
        ]

    def _give_back(self, taking: "asyncio.Future[_Loan]") -> None:
        if not taking.cancelled() and taking.exception() is None:
            self._thread.post(self._end, taking.result().loan)

    def _take(self, terms: LendTerms, on_revoked: Callable[[], None]) -> _Loan:
        num_lent = sum(len(loan.blocks) for loan in self._open if not loan.is_over)
        room = max(1, self._pool.num_blocks // POOL_SHARE) - num_lent
        found = self._pool.find_prefix(terms.block_hashes)
        blocks = found[: max(0, room)]
        loan = self._pool.lend_revocably(blocks, on_revoked)
        self._open[loan] = _Terms(terms.needer_id, time.monotonic())
        return _Loan(loan, [self._pool.generation(block) for block in blocks], len(found))

    def _lent(self, taken: _Loan) -> LentBlocks:
        blocks = list(taken.loan.blocks)
        addresses = [self._pool_address + block * self._block_bytes for block in blocks]
        return LentBlocks(0, blocks, addresses, taken.generations)

    def _end(self, loan: RevocableLoan) -> None:
        del self._open[loan]
        self._pool.end_loan(loan)


def _set_from_thread(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
        loop.call_soon_threadsafe(event.set)

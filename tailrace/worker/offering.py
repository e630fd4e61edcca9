"""Offering cached blocks to the store of this machine, ahead of their eviction. Nobody waits for it.

The store decides what it wants, and pulls that. A store that is slow or gone costs offers, which are dropped: the line
of them is short, and the newest chain is the one most likely to be still cached. A call and a loan cost about the same
for many blocks as for one, so chains wait for one another: until they are as many blocks as are lent at a time, or one
is urgent, and not for long.
"""

import asyncio
import contextlib
import logging
from collections import deque

from tailrace.errors import TailraceError
from tailrace.kv.layout import KVLayout
from tailrace.messages import BlockOffer, KvSource
from tailrace.policy.offers import CachedChain
from tailrace.rpc.client import Peer

log = logging.getLogger(__name__)

MAX_LINE = 64
"""Chains that wait to be offered; the oldest gives way."""
MAX_BLOCKS = 4096
"""Of one offer of several chains."""
GATHER_S = 0.5
"""That a chain waits for others at most: twice a second is what offers cost however many answers end."""
RETRY_S = 2.0
"""After a failed offer."""


class StoreOffers:
    """Event loop only."""

    def __init__(self, address: str, secret: bytes, *, source: KvSource, layout: KVLayout, enough: int) -> None:
        """`address`: of the store; `source`: where this worker lends; `enough`: blocks that wait for no more."""
        self._peer = Peer(address, secret)
        self._source = source
        self._layout = layout
        self._enough = enough
        self._line: deque[CachedChain] = deque(maxlen=MAX_LINE)
        self._news = asyncio.Event()
        self._is_enough = asyncio.Event()
        self._told = ""
        self._task = asyncio.create_task(self._run(), name="offers to the store")

    def add(self, chain: CachedChain) -> None:
        """Nobody here uses it any more, or it is about to be evicted."""
        self._line.append(chain)
        self._news.set()
        if chain.is_urgent or sum(len(waiting.hashes) for waiting in self._line) >= self._enough:
            self._is_enough.set()

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._peer.close()

    async def _run(self) -> None:
        while True:
            await self._news.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GATHER_S):
                    await self._is_enough.wait()
            self._news.clear()
            self._is_enough.clear()
            while self._line:
                try:
                    await self._peer.offer(self._next_offer())
                    self._told = ""
                except TailraceError as error:
                    self._say_once(error.message)
                    await asyncio.sleep(RETRY_S)

    def _next_offer(self) -> BlockOffer:
        """The newest chain, and those before it that are of the same tenant."""
        tenant = self._line[-1].tenant
        chains: list[tuple[bytes, ...]] = []
        num_blocks = 0
        while self._line and self._line[-1].tenant == tenant:
            num_blocks += len(self._line[-1].hashes)
            if chains and num_blocks > MAX_BLOCKS:
                break
            chains.append(tuple(self._line.pop().hashes))
        return BlockOffer(self._source, self._layout, tuple(chains), tenant)

    def _say_once(self, reason: str) -> None:
        if reason != self._told:
            log.warning("the store takes no offers: %s", reason)
        self._told = reason

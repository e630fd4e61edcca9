"""Offering cached blocks to the store of this machine, ahead of their eviction. Nobody waits for it.

The store decides what it wants, and pulls that. A store that is slow or gone costs offers, which are dropped: the line
of them is short, and the newest chain is the one most likely to be still cached.
"""

import asyncio
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
RETRY_S = 2.0
"""After a failed offer."""


class StoreOffers:
    """Event loop only."""

    def __init__(self, address: str, secret: bytes, *, source: KvSource, layout: KVLayout) -> None:
        """`address`: of the store; `source`: where this worker lends."""
        self._peer = Peer(address, secret)
        self._source = source
        self._layout = layout
        self._line: deque[CachedChain] = deque(maxlen=MAX_LINE)
        self._news = asyncio.Event()
        self._told = ""
        self._task = asyncio.create_task(self._run(), name="offers to the store")

    def add(self, chain: CachedChain) -> None:
        """Nobody here uses it any more, or it is about to be evicted."""
        self._line.append(chain)
        self._news.set()

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._peer.close()

    async def _run(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            while self._line:
                chain = self._line.pop()
                offer = BlockOffer(self._source, self._layout, tuple(chain.hashes), chain.tenant)
                try:
                    await self._peer.offer(offer)
                    self._told = ""
                except TailraceError as error:
                    self._say_once(error.message)
                    await asyncio.sleep(RETRY_S)

    def _say_once(self, reason: str) -> None:
        if reason != self._told:
            log.warning("the store takes no offers: %s", reason)
        self._told = reason

"""The owners that this worker pulls from: a channel, a first meeting and a proved link to each, made once."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

from tailrace.errors import LayoutMismatchError, WorkerLostError
from tailrace.kv.layout import KVLayout
from tailrace.messages import KvSource, LendDone, LendTerms, LentBlocks, OwnerRate
from tailrace.policy.pairs import ToldRates
from tailrace.rpc.client import Peer
from tailrace.transfer import Link, Needer

log = logging.getLogger(__name__)

MAX_PEERS = 256
"""Channels kept; the one unused for longest goes first."""
TELL_S = 0.5
"""A change of rates is told so much later, at most."""


class OwnerPeers:
    """Event loop only. An owner that restarts on its address has another epoch, and is met anew."""

    def __init__(self, needer: Needer, layout: KVLayout, *, worker_id: str, epoch: int, secret: bytes) -> None:
        self._needer = needer
        self._layout = layout
        self._worker_id = worker_id
        self._epoch = epoch
        self._secret = secret
        self._peers: dict[str, Peer] = {}
        self._links: dict[tuple[str, int], Link] = {}
        self._meetings: dict[tuple[str, int], asyncio.Task[Link]] = {}
        self._told = ToldRates()
        self._told_at = -math.inf

    def identity(self) -> tuple[str, int]:
        return self._worker_id, self._epoch

    async def find(self, address: str) -> KvSource:
        """Who is there now. Raises UnavailableError and what `meet` of a Peer raises."""
        endpoints, _ = await self._peer(address).meet(self._worker_id, self._epoch, self._layout, ("nixl", "stream"))
        return KvSource(endpoints.worker_id, endpoints.epoch, address, b"")

    async def link(self, source: KvSource) -> Link:
        """Raises LayoutMismatchError, TransferError, or WorkerLostError when the owner is not who it should be."""
        key = (source.worker_id, source.epoch)
        link = self._links.get(key)
        if link is not None and not link.broken:
            return link
        meeting = self._meetings.get(key)
        if meeting is None:
            meeting = self._meetings[key] = asyncio.create_task(self._meet(source))
            meeting.add_done_callback(lambda _: self._meetings.pop(key, None))
        # Others may wait for the same meeting: a request that is cancelled leaves it alone.
        return await asyncio.shield(meeting)

    def rates(self) -> tuple[OwnerRate, ...]:
        """At which it reads from each owner that is measured; the same tuple until something has changed."""
        now = time.monotonic()
        if now - self._told_at >= TELL_S:
            self._told_at = now
            self._told.update({owner: link.rate for (owner, _), link in self._links.items() if not link.broken}, now)
        return self._told.rates

    def lend(
        self, source: KvSource, terms: LendTerms
    ) -> AbstractAsyncContextManager[AsyncIterator[LentBlocks | LendDone]]:
        return self._peer(source.address).lend(terms)

    async def close(self) -> None:
        meetings = list(self._meetings.values())
        for meeting in meetings:
            meeting.cancel()
        await asyncio.gather(*meetings, return_exceptions=True)
        await asyncio.gather(*(peer.close() for peer in self._peers.values()))
        self._peers.clear()

    async def _meet(self, source: KvSource) -> Link:
        peer = self._peer(source.address)
        endpoints, layout = await peer.meet(self._worker_id, self._epoch, self._layout, ("nixl", "stream"))
        if (endpoints.worker_id, endpoints.epoch) != (source.worker_id, source.epoch):
            raise WorkerLostError(
                f"{source.address} is {endpoints.worker_id} in epoch {endpoints.epoch} now, "
                f"not {source.worker_id} in epoch {source.epoch}"
            )
        if differences := layout.differences(self._layout):
            raise LayoutMismatchError("; ".join(differences))
        link = await self._needer.connect(endpoints)
        for worker_id, epoch in [key for key in self._links if key[0] == source.worker_id]:
            del self._links[worker_id, epoch]
        self._links[source.worker_id, source.epoch] = link
        return link

    def _peer(self, address: str) -> Peer:
        peer = self._peers.pop(address, None) or Peer(address, self._secret)
        self._peers[address] = peer
        if len(self._peers) > MAX_PEERS:
            oldest = self._peers.pop(next(iter(self._peers)))
            task = asyncio.create_task(oldest.close())
            task.add_done_callback(lambda _: None)
        return peer

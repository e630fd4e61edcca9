"""The needer's side: one proved link to each owner, chosen at first contact and kept until it fails."""

import asyncio
import logging
from collections import Counter

from tailrace.errors import LayoutMismatchError, TransferError
from tailrace.messages import LinkCount
from tailrace.transfer.endpoints import PeerEndpoints
from tailrace.transfer.memory import PoolMemory
from tailrace.transfer.nixl_driver import NixlDriver
from tailrace.transfer.nixl_link import open_nixl, why_not_one_sided
from tailrace.transfer.options import TransferOptions
from tailrace.transfer.reads import Link
from tailrace.transfer.stream import open_stream

_log = logging.getLogger(__name__)


class _Refused(Exception):
    """No nixl with this peer. `why` is one of docs/metrics.md's words for it."""

    def __init__(self, why: str, reason: str) -> None:
        super().__init__(reason)
        self.why = why
        self.reason = reason


class Needer:
    """Used from one event loop. Links are kept by (worker id, epoch); the next connect proves a broken one again."""

    def __init__(
        self,
        memory: PoolMemory,
        options: TransferOptions,
        nixl: NixlDriver | None = None,
        why_no_nixl: str = "nixl was not started",
    ) -> None:
        self._memory = memory
        self._options = options
        self._nixl = nixl
        self._why_no_nixl = why_no_nixl
        self._links: dict[tuple[str, int], asyncio.Task[Link]] = {}
        self._whys: dict[tuple[str, int], str] = {}
        """Of those that are not read over nixl."""
        self._warned: set[str] = set()

    async def connect(self, peer: PeerEndpoints) -> Link:
        """The link to `peer`, over the best transport that both ends can prove.

        Raises TransferError when there is none (it says which proof failed), UnauthenticatedError when the cluster
        secrets differ, LayoutMismatchError when the blocks differ in size.
        """
        key = (peer.worker_id, peer.epoch)
        task = self._links.get(key)
        if task is None or _is_over(task):
            self._forget_older(peer)
            task = self._links[key] = asyncio.create_task(self._open(peer))
        # Others may wait for the same contact: a caller that is cancelled leaves it alone.
        return await asyncio.shield(task)

    def links(self) -> tuple[LinkCount, ...]:
        """Those that can be read now, by transport and by why that is not nixl."""
        counts = Counter(
            (task.result().transport, self._whys.get(key, ""))
            for key, task in self._links.items()
            if task.done() and not _is_over(task)
        )
        return tuple(LinkCount(transport, why, num) for (transport, why), num in sorted(counts.items()))

    def forget(self, worker_id: str, epoch: int) -> None:
        """Drop the link to a worker that is gone. Its reads settle as Link.abort says."""
        task = self._links.pop((worker_id, epoch), None)
        self._whys.pop((worker_id, epoch), None)
        if task is not None:
            task.add_done_callback(_abort)
            task.cancel()

    async def close(self) -> None:
        """Drop every link and wait for what is in flight, as far as its transport can end it. Idempotent."""
        tasks = list(self._links.values())
        for worker_id, epoch in list(self._links):
            self.forget(worker_id, epoch)
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(outcome, BaseException):
                outcome.abort()
                await asyncio.to_thread(outcome.join)

    def _forget_older(self, peer: PeerEndpoints) -> None:
        for worker_id, epoch in list(self._links):
            if worker_id == peer.worker_id and epoch <= peer.epoch:
                self.forget(worker_id, epoch)

    async def _open(self, peer: PeerEndpoints) -> Link:
        if peer.block_bytes != self._memory.block_bytes:
            raise LayoutMismatchError(f"block_bytes: owner={peer.block_bytes} needer={self._memory.block_bytes}")
        link = await self._choose(peer)
        _log.info("%s reads from %s over %s", self._options.worker_id, peer.worker_id, link.transport)
        return link

    async def _choose(self, peer: PeerEndpoints) -> Link:
        try:
            return await self._open_nixl(peer)
        except _Refused as refused:
            why, reason = refused.why, refused.reason
        if self._options.preference == "nixl":
            raise TransferError(f"{peer.worker_id} cannot be read over nixl: {reason}")
        if self._options.preference == "auto":
            self._warn(peer, reason)
        if self._memory.view is None:
            raise TransferError(
                f"{peer.worker_id} cannot be read over a stream: our pool has no bytes the CPU can reach"
            )
        link = await self._open_stream(peer)
        self._whys[peer.worker_id, peer.epoch] = why
        return link

    async def _open_nixl(self, peer: PeerEndpoints) -> Link:
        """Raises _Refused."""
        if self._options.preference == "stream":
            raise _Refused("configured", "the options ask for a stream")
        if self._nixl is None:
            raise _Refused("not_started", self._why_no_nixl)
        if peer.nixl is None:
            raise _Refused("not_offered", "the owner does not offer it")
        if reason := why_not_one_sided(self._nixl, peer.nixl):
            raise _Refused("no_way", reason)
        try:
            return await open_nixl(self._nixl, peer, peer.nixl, self._options.proof_timeout_s)
        except TransferError as error:
            raise _Refused("unproved", error.message) from error

    async def _open_stream(self, peer: PeerEndpoints) -> Link:
        opening = asyncio.create_task(asyncio.to_thread(open_stream, peer, self._memory, self._options))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_abort)
            raise

    def _warn(self, peer: PeerEndpoints, reason: str) -> None:
        level = logging.DEBUG if reason in self._warned else logging.WARNING
        self._warned.add(reason)
        _log.log(level, "%s cannot be read over nixl, falling back to a stream: %s", peer.worker_id, reason)


def _is_over(task: "asyncio.Task[Link]") -> bool:
    if not task.done():
        return False
    return task.cancelled() or task.exception() is not None or task.result().broken


def _abort(task: "asyncio.Task[Link]") -> None:
    """Give up a link that nobody keeps; a contact that failed leaves none."""
    if not task.cancelled() and task.exception() is None:
        task.result().abort()

"""One request's prompt, pulled from the worker that prefills it, chunk by chunk while it still computes."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from services.decode.worker import DecodeWorker, Pull
from tailrace.errors import ErrorCode, InternalError, TailraceError, TransferError
from tailrace.messages import KvSource, LendDone, LendTerms, LentBlocks
from tailrace.policy.request import Request
from tailrace.transfer import BlockRead, Link, PendingRead, ReadOutcome, ReadResult
from tailrace.worker.engine_thread import EngineThread
from tailrace.worker.reading import LendEvents, Peers, stall_s
from tailrace.worker.report import Destination

log = logging.getLogger(__name__)

CANCEL_GRACE_S = 1.0
"""An owner that has forgotten the request was most likely told to: the cancel of this leg is on its way."""
_FATAL = frozenset({ErrorCode.LAYOUT_MISMATCH, ErrorCode.UNAUTHENTICATED})
"""A wrong configuration: computing the prompt here would hide it."""


@dataclass(frozen=True, slots=True, eq=False)
class _Flight:
    """A read that may still write its targets."""

    read: PendingRead
    targets: tuple[int, ...]
    deadline: float


class PromptPull:
    """Books, pulls, joins. Ends in exactly one of: joined, recomputed here, dropped. Event loop only.

    A destination stays landing until its read has settled, whatever becomes of the request: a read that outlives it
    hands its blocks back when it ends.
    """

    def __init__(
        self, request: Request, name: str, source: KvSource, engine: EngineThread, worker: DecodeWorker
    ) -> None:
        self._request = request
        self._name = name
        self._source = source
        self._engine = engine
        self._worker = worker
        self._granted: asyncio.Future[Destination] = asyncio.get_running_loop().create_future()
        self._flights: dict[PendingRead, _Flight] = {}
        self._failure: ReadResult | None = None
        self._settled = asyncio.Event()
        self._is_over = False
        self._num_told = worker.first_handed_over(request)
        """Blocks of the prompt; those before the window of what decodes are not asked for."""
        self._reading_s = 0.0
        self._num_bytes = 0

    def grant(self, destination: Destination) -> None:
        if not self._granted.done():
            self._granted.set_result(destination)

    async def run(self, peers: Peers, attempt: tuple[str, int], *, failed: Callable[[TailraceError], None]) -> None:
        """`failed` is called for an error that recomputing cannot mend. A cancel, at any moment, drops the request."""
        try:
            if await self._engine.call(self._worker.book, self._request, self._name):
                await self._pull_or_recompute(peers, attempt, failed)
        except asyncio.CancelledError:
            self._drop()
            raise

    async def _pull_or_recompute(
        self, peers: Peers, attempt: tuple[str, int], failed: Callable[[TailraceError], None]
    ) -> None:
        try:
            await self._pull(peers, attempt)
        except TailraceError as error:
            if error.code in _FATAL:
                self._drop()
                failed(error)
                return
            if error.code is ErrorCode.NOT_FOUND:
                await asyncio.sleep(CANCEL_GRACE_S)
            log.warning("%s: %s; its prompt is computed here instead", self._name, error.message)
            self._recompute()
        except Exception as error:
            log.exception("%s: its pull failed in a way that nobody thought of", self._name)
            self._drop()
            failed(InternalError(f"the pull of its prompt failed: {error!r}"))

    async def _pull(self, peers: Peers, attempt: tuple[str, int]) -> None:
        link = await peers.link(self._source)
        worker_id, epoch = peers.identity()
        terms = LendTerms(*attempt, self._source.ticket, worker_id, epoch, link.transport, skip_blocks=self._num_told)
        async with peers.lend(self._source, terms) as events:
            done = await self._follow(link, events)
            await self._all_landed()
        pull = Pull(self._reading_s, self._num_bytes, link.transport if self._num_bytes else "")
        self._is_over = True
        self._engine.post(self._worker.join, self._request.id, done.first_tokens, pull)

    async def _follow(self, link: Link, events: LendEvents) -> LendDone:
        """Start a read for whatever is ready, until the owner says that this was all."""
        async for event in events:
            if isinstance(event, LendDone):
                self._check_complete(event)
                return event
            destination = await self._destination()
            self._check_next(event, destination)
            self._start(link, event, destination)
        raise TransferError("the owner closed the stream before all blocks were lent")

    def _check_next(self, lent: LentBlocks, destination: Destination) -> None:
        """Blocks are told in order, each once: what an owner leaves out would be decoded from as it lies there."""
        end = lent.first_index + len(lent.blocks)
        if lent.first_index != self._num_told or end > len(destination.blocks):
            raise TransferError(
                f"{self._source.worker_id} lent blocks {lent.first_index} to {end - 1} of {len(destination.blocks)} "
                f"after block {self._num_told - 1}"
            )
        self._num_told = end

    def _check_complete(self, done: LendDone) -> None:
        missing = set(self._request.choices) - {token.choice for token in done.first_tokens}
        needed = len(self._granted.result().blocks) if self._granted.done() else None
        if missing or self._num_told != needed:
            raise TransferError(
                f"{self._source.worker_id} was done after {self._num_told} of {needed} blocks, "
                f"without a first token for choices {sorted(missing)}"
            )

    async def _destination(self) -> Destination:
        if not self._granted.done():
            self._engine.post(self._worker.want_destination, self._request.id)
        return await asyncio.shield(self._granted)

    def _start(self, link: Link, lent: LentBlocks, destination: Destination) -> None:
        reads = [
            BlockRead(block, address, generation, destination.blocks[index])
            for index, (block, address, generation) in enumerate(
                zip(lent.blocks, lent.addresses, lent.generations, strict=True), start=lent.first_index
            )
            if index >= destination.num_local
        ]
        if not reads:
            return
        now = time.monotonic()
        read = link.read(reads)
        size = len(reads) * self._worker.block_bytes
        self._flights[read] = _Flight(read, tuple(r.target_block for r in reads), now + stall_s(link, size))
        self._num_bytes += size
        read.settled.add_done_callback(lambda _: self._on_settled(read))

    def _on_settled(self, read: PendingRead) -> None:
        """Nothing can land any more: the blocks are ours, or nobody's."""
        flight, result = self._flights.pop(read), read.settled.result()
        self._reading_s += result.elapsed_s
        if self._is_over:
            self._engine.post(self._worker.settle, flight.targets)
        elif result.outcome is ReadOutcome.GOOD:
            self._engine.post(self._worker.landed, self._request.id, flight.targets)
        else:
            self._failure = result
        self._settled.set()

    async def _all_landed(self) -> None:
        """Raises TransferError for a read that failed, was stale or stalls."""
        while self._flights and self._failure is None:
            patience = min(flight.deadline for flight in self._flights.values()) - time.monotonic()
            self._settled.clear()
            try:
                async with asyncio.timeout(max(0.0, patience)):
                    await self._settled.wait()
            except TimeoutError:
                raise TransferError(f"{len(self._flights)} reads from {self._source.worker_id} stall") from None
        if self._failure is not None:
            raise TransferError(f"read from {self._source.worker_id}: {self._failure.message or self._failure.outcome}")

    # -- the other ends -----------------------------------------------------------------------------------------------

    def _in_flight(self) -> list[int]:
        return [block for flight in self._flights.values() for block in flight.targets]

    def _drop(self) -> None:
        self._is_over = True
        self._engine.post(self._worker.drop, self._request.id, (), self._in_flight())

    def _recompute(self) -> None:
        """Destinations that may still be written are quarantined: they come back when their reads settle."""
        self._is_over = True
        in_flight = self._in_flight()
        self._engine.post(self._worker.recompute, self._request.id, in_flight)
        if in_flight:
            self._engine.post(self._worker.quarantine, in_flight)

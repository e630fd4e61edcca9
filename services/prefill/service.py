"""The prefill worker as its event loop sees it: legs of gateways, needers, and holders of prefixes."""

import asyncio
import logging

from services.prefill.worker import PrefillWorker
from tailrace.kv.layout import KVLayout
from tailrace.messages import PrefixSource
from tailrace.worker.attach import Attachments, Leg
from tailrace.worker.engine_thread import EngineThread
from tailrace.worker.lending import Lender
from tailrace.worker.offering import StoreOffers
from tailrace.worker.prefix_fetch import PrefixPull, WantedPrefix, pieces_of, sources_of
from tailrace.worker.reading import Peers
from tailrace.worker.report import PrefixDestination, StepReport
from tailrace.worker.requests import RequestMaker

log = logging.getLogger(__name__)


class PrefillService:
    """Glue without decisions. Event loop only."""

    def __init__(
        self,
        worker: PrefillWorker,
        requests: RequestMaker,
        peers: Peers,
        layout: KVLayout,
        offers: StoreOffers | None = None,
    ) -> None:
        """`offers`: None where there is no store."""
        self._worker = worker
        self._offers = offers
        self._requests = requests
        self._peers = peers
        self._layout = layout
        self._sources: dict[int, tuple[PrefixSource, ...]] = {}
        """Of legs that may still be told to fetch."""
        self._fetches: dict[int, asyncio.Task[None]] = {}
        self._engine: EngineThread
        self._attachments: Attachments
        self._lender: Lender

    def connect(self, engine: EngineThread, attachments: Attachments, lender: Lender) -> None:
        """Everyone knows everyone, once, before anything runs."""
        self._engine, self._attachments, self._lender = engine, attachments, lender

    # -- LegHandler ---------------------------------------------------------------------------------------------------

    def begin(self, leg: Leg) -> None:
        request = self._requests.make(leg.id, leg.submission)
        self._lender.admit(leg.submission.request_id, leg.submission.attempt, leg.id)
        own_id, _ = self._peers.identity()
        if sources := sources_of(leg.submission, own_id):
            self._sources[leg.id] = sources
        self._engine.post(self._worker.submit, request, leg.name, pieces_of(sources))

    def cancel(self, leg: Leg, choices: tuple[int, ...]) -> None:
        """A cancelled choice costs prefill nothing more: only whole legs end here."""
        if not choices:
            self._drop(leg.id)
            self._lender.forget(leg.id)

    # -- the engine, the needers --------------------------------------------------------------------------------------

    def deliver(self, report: StepReport) -> None:
        self._attachments.deliver(report)
        self._lender.deliver(report.lends)
        for destination in report.fetching:
            self._begin_fetch(destination)
        if self._offers is not None:
            for chain in report.chains:
                self._offers.add(chain)
        for leg_id in [*report.ended, *(failure.handle for failure in report.failed)]:
            self._sources.pop(leg_id, None)
            self._lender.forget(leg_id)

    def ask_progress(self, leg_id: int) -> None:
        self._engine.post(self._worker.tell_progress, leg_id)

    def gave_back(self, leg_id: int) -> None:
        """Pulled, or no longer wanted: either way nobody reads the blocks any more."""
        self._drop(leg_id)

    def _drop(self, leg_id: int) -> None:
        """A fetch that is under way drops the request itself: only it knows which blocks may still be written."""
        self._sources.pop(leg_id, None)
        if (task := self._fetches.get(leg_id)) is None:
            self._engine.post(self._worker.drop, leg_id)
        elif not task.cancel():
            # It is over, and about to say so.
            asyncio.get_running_loop().call_soon(self._engine.post, self._worker.drop, leg_id)

    # -- fetches ------------------------------------------------------------------------------------------------------

    def _begin_fetch(self, destination: PrefixDestination) -> None:
        """Not for a leg whose drop is on its way to the engine."""
        leg_id, engine = destination.request_id, self._engine
        if (sources := self._sources.pop(leg_id, None)) is None:
            return
        pull = PrefixPull(
            WantedPrefix.of(destination, self._layout),
            sources,
            landed=lambda blocks: engine.post(self._worker.landed, leg_id, blocks),
            settled=lambda blocks: engine.post(self._worker.settle, blocks),
        )
        task = asyncio.create_task(pull.run(self._peers, destination.patience_s), name=f"prefix of {leg_id}")
        self._fetches[leg_id] = task
        task.add_done_callback(lambda task: self._end_fetch(leg_id, pull, task))

    def _end_fetch(self, leg_id: int, pull: PrefixPull, task: asyncio.Task[None]) -> None:
        del self._fetches[leg_id]
        in_flight = pull.close()
        if task.cancelled():
            self._engine.post(self._worker.drop, leg_id, in_flight)
            return
        if (error := task.exception()) is not None:
            log.error("a fetch failed in a way that nobody thought of; its prompt is computed", exc_info=error)
        self._engine.post(self._worker.end_fetch, leg_id, pull.result(), in_flight)

    async def close(self) -> None:
        tasks = list(self._fetches.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

"""The prefill worker as its event loop sees it: legs of gateways on one side, needers on the other."""

from services.prefill.worker import PrefillWorker
from tailrace.worker.attach import Attachments, Leg
from tailrace.worker.engine_thread import EngineThread
from tailrace.worker.lending import Lender
from tailrace.worker.offering import StoreOffers
from tailrace.worker.report import StepReport
from tailrace.worker.requests import RequestMaker


class PrefillService:
    """Glue without decisions. Event loop only."""

    def __init__(self, worker: PrefillWorker, requests: RequestMaker, offers: StoreOffers | None = None) -> None:
        """`offers`: None where there is no store."""
        self._worker = worker
        self._offers = offers
        self._requests = requests
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
        self._engine.post(self._worker.submit, request, leg.name)

    def cancel(self, leg: Leg, choices: tuple[int, ...]) -> None:
        """A cancelled choice costs prefill nothing more: only whole legs end here."""
        if not choices:
            self._engine.post(self._worker.drop, leg.id)
            self._lender.forget(leg.id)

    # -- the engine, the needers --------------------------------------------------------------------------------------

    def deliver(self, report: StepReport) -> None:
        self._attachments.deliver(report)
        self._lender.deliver(report.lends)
        if self._offers is not None:
            for chain in report.chains:
                self._offers.add(chain)
        for leg_id in [*report.ended, *(failure.handle for failure in report.failed)]:
            self._lender.forget(leg_id)

    def ask_progress(self, leg_id: int) -> None:
        self._engine.post(self._worker.tell_progress, leg_id)

    def gave_back(self, leg_id: int) -> None:
        """Pulled, or no longer wanted: either way nobody reads the blocks any more."""
        self._engine.post(self._worker.drop, leg_id)

"""The decode worker as its event loop sees it: legs of gateways on one side, owners of KV on the other."""

import asyncio
from functools import partial

from services.decode.fetch import LocalFetches
from services.decode.pull import PromptPull
from services.decode.worker import DecodeWorker
from tailrace.worker.attach import Attachments, Leg
from tailrace.worker.engine_thread import EngineThread
from tailrace.worker.offering import StoreOffers
from tailrace.worker.prefix_fetch import pieces_of, sources_of
from tailrace.worker.reading import Peers
from tailrace.worker.report import StepReport
from tailrace.worker.requests import RequestMaker


class DecodeService:
    """Glue without decisions. Event loop only."""

    def __init__(
        self, worker: DecodeWorker, requests: RequestMaker, peers: Peers, offers: StoreOffers | None = None
    ) -> None:
        """`offers`: None where there is no store."""
        self._worker = worker
        self._requests = requests
        self._peers = peers
        self._offers = offers
        self._pulls: dict[int, PromptPull] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._engine: EngineThread
        self._attachments: Attachments
        self._fetches: LocalFetches

    def connect(self, engine: EngineThread, attachments: Attachments, fetches: LocalFetches) -> None:
        """Everyone knows everyone, once, before anything runs."""
        self._engine, self._attachments, self._fetches = engine, attachments, fetches

    # -- LegHandler ---------------------------------------------------------------------------------------------------

    def begin(self, leg: Leg) -> None:
        request = self._requests.make(leg.id, leg.submission)
        source = leg.submission.source
        if source is None:
            own_id, _ = self._peers.identity()
            sources = sources_of(leg.submission, own_id)
            self._fetches.name(leg.id, sources)
            self._engine.post(self._worker.submit_local, request, leg.name, pieces_of(sources))
            return
        pull = PromptPull(request, leg.name, source, self._engine, self._worker)
        attempt = (leg.submission.request_id, leg.submission.attempt)
        failed = partial(self._attachments.fail, leg.id)
        task = asyncio.create_task(pull.run(self._peers, attempt, failed=failed), name=f"pull {leg.name}")
        self._pulls[leg.id], self._tasks[leg.id] = pull, task
        task.add_done_callback(lambda _: self._forget(leg.id))

    def cancel(self, leg: Leg, choices: tuple[int, ...]) -> None:
        """A pull that is under way drops the request itself: only it knows which blocks may still be written."""
        task = self._tasks.get(leg.id)
        if task is None or task.done():
            self._engine.post(self._worker.drop, leg.id, choices)
        elif choices:
            # After the task's own first turn, which books: a drop that comes before it would be lost.
            asyncio.get_running_loop().call_soon(self._engine.post, self._worker.drop, leg.id, choices)
        else:
            task.cancel()

    def _forget(self, leg_id: int) -> None:
        self._pulls.pop(leg_id, None)
        self._tasks.pop(leg_id, None)

    # -- the engine ---------------------------------------------------------------------------------------------------

    def deliver(self, report: StepReport) -> None:
        self._attachments.deliver(report)
        if self._offers is not None:
            for chain in report.chains:
                self._offers.add(chain)
        for fetch in report.fetching:
            self._fetches.begin(fetch)
        for destination in report.granted:
            if (pull := self._pulls.get(destination.request_id)) is not None:
                pull.grant(destination)
        for leg_id in report.ended:
            self._fetches.forget(leg_id)
            # Still pulling: its choices were cancelled one by one.
            if (task := self._tasks.get(leg_id)) is not None:
                task.cancel()
        for failure in report.failed:
            self._fetches.forget(failure.handle)

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._fetches.close()

"""A test in a gateway's place: it attaches to one worker, and tells it where prefixes are."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tailrace.errors import TailraceError
from tailrace.messages import KvSource, LedgerReport, LegReport, PrefixSource, StepEvents, Submission, WorkerInfo
from tailrace.rpc.client import AttachCall, Peer
from tailrace.types import SamplingParams

_SAMPLING = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=0)


@dataclass(frozen=True)
class Answer:
    token: int
    logprob: float
    ttft_s: float
    report: LegReport


class DirectWorker:
    """Of prefill: its blocks are given back once the first token is there. Of decode: it prefills itself."""

    def __init__(self, peer: Peer, call: AttachCall, info: WorkerInfo) -> None:
        self.peer = peer
        self.info = info
        self._call = call
        self._handles = itertools.count(1)
        self._heard = asyncio.Condition()
        self._events: list[tuple[float, StepEvents]] = []

    @property
    def source(self) -> KvSource:
        return KvSource(self.info.worker_id, self.info.epoch, self.info.address, b"")

    def holds(self, num_blocks: int, first: int = 0) -> PrefixSource:
        return PrefixSource(self.source, first, num_blocks)

    async def ask(self, tokens: Sequence[int], *sources: PrefixSource, timeout_s: float = 30.0) -> Answer:
        """The first token of a prompt."""
        handle = next(self._handles)
        began = time.monotonic()
        submission = Submission(
            handle, f"r{handle}", 0, list(tokens), len(tokens), _SAMPLING, (0,), 0, 60.0, prefix_sources=sources
        )
        self._call.submit(submission)
        async with asyncio.timeout(timeout_s), self._heard:
            await self._heard.wait_for(lambda: self._report(handle) is not None)
        self._call.cancel(handle)
        report = self._report(handle)
        assert report is not None
        return self._answer(handle, began, report)

    def _report(self, handle: int) -> LegReport | None:
        for _, events in self._events:
            assert handle not in [failure.handle for failure in events.failed], events.failed
        return next((r for _, events in self._events for r in events.reports if r.handle == handle), None)

    def _answer(self, handle: int, began: float, report: LegReport) -> Answer:
        at, events = next(each for each in self._events if handle in each[1].tokens.handles)
        row = events.tokens.handles.index(handle)
        assert events.tokens.logprobs is not None
        logprob = events.tokens.logprobs[row]
        assert logprob is not None
        return Answer(events.tokens.token_ids[row], logprob.logprob, at - began, report)

    async def ledger(self) -> LedgerReport:
        return await self.peer.ledger()

    async def until_idle(self, timeout_s: float = 10.0) -> LedgerReport:
        """Every block is free or cached, and nobody holds anything."""
        async with asyncio.timeout(timeout_s):
            while True:
                ledger = await self.ledger()
                if ledger.free + ledger.cached == ledger.total and not ledger.holdings:
                    return ledger
                await asyncio.sleep(0.01)

    async def _listen(self, events: AsyncIterator[StepEvents]) -> None:
        async for each in events:
            async with self._heard:
                self._events.append((time.monotonic(), each))
                self._heard.notify_all()


@asynccontextmanager
async def direct(address: str, secret: str, timeout_s: float = 60.0) -> AsyncIterator[DirectWorker]:
    """Waits until the worker is there."""
    peer = Peer(address, secret.encode())
    try:
        async with asyncio.timeout(timeout_s):
            while not await _answers(peer):  # noqa: ASYNC110 - another process: nothing to wait on
                await asyncio.sleep(0.05)
        call = peer.attach("test", 1)
        events = call.events()
        info = (await anext(events)).info
        assert info is not None
        worker = DirectWorker(peer, call, info)
        listening = asyncio.create_task(worker._listen(events))
        try:
            yield worker
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
            call.close()
    finally:
        await peer.close()


async def _answers(peer: Peer) -> bool:
    try:
        await peer.ledger()
    except TailraceError:
        return False
    return True

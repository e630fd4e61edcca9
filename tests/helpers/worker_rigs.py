"""Whole workers but for the model and the network: engine thread, scheduler, attachments, a gateway that listens."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from services.decode.fetch import LocalFetches
from services.decode.service import DecodeService
from services.decode.worker import DecodeWorker
from services.prefill.service import PrefillService
from services.prefill.worker import PrefillWorker
from tailrace.kv.block_pool import BlockPool
from tailrace.messages import (
    FirstToken,
    KvSource,
    LegFailed,
    LegReport,
    LendDone,
    LendTerms,
    LentBlocks,
    Submission,
)
from tailrace.policy.decode_scheduler import DecodeScheduler
from tailrace.policy.prefill_scheduler import PrefillScheduler
from tailrace.policy.request import StopRule
from tailrace.policy.swap import SwapCost
from tailrace.transfer import BlockRead, PendingRead, ReadOutcome, ReadResult
from tailrace.transfer.reads import RateMeter
from tailrace.types import FinishReason, Role
from tailrace.worker.attach import Attachments, Session
from tailrace.worker.compute_thread import ComputeThread
from tailrace.worker.engine_thread import EngineThread
from tailrace.worker.lending import Lender
from tailrace.worker.requests import RequestMaker
from tailrace.worker.runner import Runner
from tests.helpers.fake_runner import EOS, FakeRunner, generate
from tests.helpers.prefix_holders import FakeHolder, FakeHolders
from tests.helpers.values import SECRET, VOCAB_SIZE, make_info, make_layout, make_submission
from tests.helpers.waiting import PATIENCE_S, until

MAX_MODEL_LEN = 64
POOL_ADDRESS = 1 << 20
OVERLAP = False
"""The loop of the rigs' engine threads; `both_loops` sets it."""


@dataclass
class Gateway:
    """Reads one session, in the background."""

    session: Session
    tokens: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    finished: dict[tuple[int, int], FinishReason] = field(default_factory=dict)
    failed: list[LegFailed] = field(default_factory=list)
    reports: list[LegReport] = field(default_factory=list)

    async def listen(self) -> None:
        async for event in self.session.events():
            columns = event.tokens
            for handle, choice, token in zip(columns.handles, columns.choices, columns.token_ids, strict=True):
                self.tokens.setdefault((handle, choice), []).append(token)
            self.finished.update({(f.handle, f.choice): f.reason for f in event.finished})
            self.failed.extend(event.failed)
            self.reports.extend(event.reports)


@dataclass
class Rig:
    pool: BlockPool
    runner: FakeRunner
    engine: EngineThread
    attachments: Attachments
    deaths: list[BaseException]
    gateway: Gateway
    peers: "FakeHolders | FakePeers"

    def submit(self, submission: Submission) -> None:
        self.attachments.submit(self.gateway.session, submission)

    def cancel(self, handle: int, choices: tuple[int, ...] = ()) -> None:
        self.attachments.cancel(self.gateway.session, handle, choices)

    def add_holder(self, name: str, tokens: Sequence[int], held: range, **options: object) -> FakeHolder:
        """Of blocks of the prompt `tokens`."""
        chain = RequestMaker(make_layout(), VOCAB_SIZE).make(0, make_submission(tokens=list(tokens))).hashes

        def land(block: int, place: int) -> None:
            if place >= 0:
                self.runner.land(block, place, tokens)
            else:
                self.runner.write(block, [-1] * 4)

        holder = FakeHolder(name, chain, held, land=land, **options)  # type: ignore[arg-type]
        self.peers.holders[name] = holder
        return holder

    async def ledger(self) -> str:
        await self.engine.call(self.pool.check_integrity)
        return str(await self.engine.call(self.pool.ledger))

    async def until_ledger(self, *allowed: str) -> None:
        """Waits for a ledger without any state but these."""
        async with asyncio.timeout(PATIENCE_S):
            while not {part.partition("=")[0] for part in (await self.ledger()).split()} <= {*allowed}:  # noqa: ASYNC110
                await asyncio.sleep(0.002)

    async def until_idle(self) -> None:
        await until(lambda: self.attachments.num_legs == 0)
        await self.until_ledger("free", "cached")


@dataclass
class PrefillRig(Rig):
    peers: FakeHolders
    worker: PrefillWorker
    lender: Lender
    service: PrefillService


@asynccontextmanager
async def prefill_rig(*, num_blocks: int = 16, budget: int = 16) -> AsyncIterator[PrefillRig]:
    layout = make_layout()
    pool = BlockPool(num_blocks, epoch=7)
    runner = FakeRunner(pool, block_size=4, max_num_seqs=4)
    scheduler = PrefillScheduler(
        pool,
        block_size=4,
        max_num_seqs=4,
        max_num_batched_tokens=budget,
        stop=StopRule(frozenset({EOS}), MAX_MODEL_LEN),
    )
    worker = PrefillWorker(_launching(runner), scheduler, pool, layout, pool_address=POOL_ADDRESS)
    peers = FakeHolders()
    service = PrefillService(worker, RequestMaker(layout, VOCAB_SIZE), peers, layout)
    deaths: list[BaseException] = []
    engine = EngineThread(worker, deliver=service.deliver, died=deaths.append, overlap=OVERLAP)
    attachments = Attachments(make_info(Role.PREFILL), service, steps=lambda: engine.num_steps)
    lender = Lender(
        secret=SECRET, worker_id="w", epoch=7, ask_progress=service.ask_progress, gave_back=service.gave_back
    )
    service.connect(engine, attachments, lender)
    gateway = Gateway(attachments.open("g", 1))
    rig = PrefillRig(pool, runner, engine, attachments, deaths, gateway, peers, worker, lender, service)
    async with _living(rig):
        try:
            yield rig
        finally:
            await service.close()


@dataclass
class DecodeRig(Rig):
    peers: "FakePeers"
    worker: DecodeWorker
    service: DecodeService
    swap_cost: SwapCost

    def start_owner(self, submission: Submission) -> "FakeOwner":
        owner = self.peers.owners[submission.request_id] = FakeOwner(submission)
        return owner


@asynccontextmanager
async def decode_rig(*, num_blocks: int = 16, budget: int = 16, max_num_seqs: int = 4) -> AsyncIterator[DecodeRig]:
    layout = make_layout()
    pool = BlockPool(num_blocks, epoch=7)
    runner = FakeRunner(pool, block_size=4, max_num_seqs=max_num_seqs)
    scheduler = DecodeScheduler(
        pool,
        block_size=4,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        stop=StopRule(frozenset({EOS}), MAX_MODEL_LEN),
        swap_cost=(cost := SwapCost(block_bytes=layout.block_bytes, block_tokens=4)),
    )
    worker = DecodeWorker(
        _launching(runner),
        scheduler,
        pool,
        block_bytes=layout.block_bytes,
        block_tokens=layout.block_size,
        swap_cost=cost,
    )
    peers = FakePeers(FakeLink(runner))
    service = DecodeService(worker, RequestMaker(layout, VOCAB_SIZE), peers)
    deaths: list[BaseException] = []
    engine = EngineThread(worker, deliver=service.deliver, died=deaths.append, overlap=OVERLAP)
    attachments = Attachments(make_info(), service, steps=lambda: engine.num_steps)
    service.connect(engine, attachments, LocalFetches(worker, engine, peers, layout, store=None))
    gateway = Gateway(attachments.open("g", 1))
    rig = DecodeRig(pool, runner, engine, attachments, deaths, gateway, peers, worker, service, cost)
    async with _living(rig):
        try:
            yield rig
        finally:
            await service.close()


def _launching(runner: FakeRunner) -> Runner:
    return ComputeThread(runner) if OVERLAP else runner


@asynccontextmanager
async def _living(rig: Rig) -> AsyncIterator[None]:
    rig.engine.start()
    listening = asyncio.create_task(rig.gateway.listen())
    try:
        yield
    finally:
        rig.attachments.close(rig.gateway.session)
        await listening
        await rig.engine.stop()
    assert not rig.deaths, rig.deaths


# -- the other end of a decode worker ---------------------------------------------------------------------------------


class FakeLink:
    """Reads end when a test says so. An owner's block numbers are the entries of its request's table."""

    transport = "stream"
    broken = False

    def __init__(self, runner: FakeRunner) -> None:
        self.rate = RateMeter()
        self.flights: list[tuple[Sequence[BlockRead], PendingRead]] = []
        self._runner = runner

    def read(self, reads: Sequence[BlockRead]) -> PendingRead:
        pending = PendingRead(asyncio.get_running_loop())
        self.flights.append((reads, pending))
        return pending

    def finish(self, tokens: Sequence[int], outcome: ReadOutcome = ReadOutcome.GOOD, at: int = 0) -> None:
        """What lands is the prompt's KV, or rubbish."""
        reads, pending = self.flights.pop(at)
        for read in reads:
            if outcome is ReadOutcome.GOOD:
                self._runner.land(read.target_block, read.source_block, tokens)
            else:
                self._runner.write(read.target_block, [-1] * 4)
        pending.settle(ReadResult(outcome, 0.001, 1, ""))


class FakeOwner:
    """A prefill worker, as one needer sees it."""

    def __init__(self, submission: Submission) -> None:
        self.submission = submission
        self.events: asyncio.Queue[LentBlocks | LendDone | BaseException | None] = asyncio.Queue()
        self.terms: LendTerms | None = None
        self.is_open = False

    @property
    def num_blocks(self) -> int:
        return -(-len(self.submission.tokens) // 4)

    def ready(self, first: int, end: int) -> None:
        ids = list(range(first, end))
        self.events.put_nowait(LentBlocks(first, ids, [1000 * i for i in ids], [70 + i for i in ids]))

    def done(self) -> None:
        sampling, tokens = self.submission.sampling, self.submission.tokens
        first = [(choice, generate(tokens, sampling, choice, 1)[0]) for choice in self.submission.choices]
        reason = FinishReason.LENGTH if sampling.max_tokens == 1 else None
        self.events.put_nowait(LendDone(tuple(FirstToken(c, t, None, reason) for c, t in first), 1, 0, 0.0, 0.0))

    def all_ready(self) -> None:
        self.ready(0, self.num_blocks)
        self.done()

    async def read(self) -> AsyncIterator[LentBlocks | LendDone]:
        while (event := await self.events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event


class FakePeers:
    """Every owner is at the end of one link. `meeting`, where a test sets it, is awaited before the link is there.

    Holders of cached blocks are asked by their names.
    """

    def __init__(self, link: FakeLink) -> None:
        self.the_link = link
        self.owners: dict[str, FakeOwner] = {}
        self.meeting: Callable[[], asyncio.Future[None]] | None = None
        self.cached = FakeHolders()

    @property
    def holders(self) -> dict[str, FakeHolder]:
        return self.cached.holders

    def identity(self) -> tuple[str, int]:
        return "d", 9

    async def link(self, source: KvSource) -> FakeLink | FakeHolder:
        if source.worker_id in self.holders:
            return await self.cached.link(source)
        if self.meeting is not None:
            await self.meeting()
        return self.the_link

    @asynccontextmanager
    async def lend(self, source: KvSource, terms: LendTerms) -> AsyncIterator[AsyncIterator[LentBlocks | LendDone]]:
        if source.worker_id in self.holders:
            async with self.cached.lend(source, terms) as lent:
                yield lent
            return
        owner = self.owners[terms.request_id]
        owner.terms, owner.is_open = terms, True
        try:
            async with contextlib.aclosing(owner.read()) as events:  # type: ignore[type-var]
                yield events
        finally:
            owner.is_open = False


__all__ = ["DecodeRig", "FakeOwner", "Gateway", "PrefillRig", "decode_rig", "prefill_rig", "until"]

"""What attached workers say, and who hears it. Played by fake workers on a fake network."""

from dataclasses import replace

import pytest

from services.gateway import members as members_module
from tailrace.errors import ErrorCode, InternalError, WorkerLostError
from tailrace.kv.events import KVEvents
from tailrace.messages import KvEventBatch, LegReport, OwnerRate, StepEvents
from tailrace.policy.pairs import NO_PAIRS
from tailrace.types import FinishReason
from tests.helpers.attached_members import BUSY, decode_worker, gateway, names
from tests.helpers.fake_members import IDLE, collect, fake_cluster, settle, until


def published(*hashes, first=0):
    return KvEventBatch(1, first, KVEvents.published([block_hash * 16 for block_hash in hashes]))


# -- what they say ----------------------------------------------------------------------------------------------------


class Sink:
    """Hears all; breaks where it is told to."""

    def __init__(self, *broken):
        self.heard = []
        self._broken = broken

    def _hear(self, name, *what):
        self.heard.append((name, *what))
        if name in self._broken:
            raise RuntimeError("a defect of a sink")

    def on_tokens(self, choice, position, ids, logprobs):
        self._hear("tokens", choice, position, ids)

    def on_report(self, report):
        self._hear("report", report.prefill_s)

    def on_finished(self, choice, reason):
        self._hear("finished", choice, reason)

    def on_failed(self, error):
        self._hear("failed", error.code)


@pytest.mark.parametrize("broken", [["tokens"], ["report"], ["finished"], ["tokens", "failed"], ["failed"]])
async def test_a_sink_that_raises_takes_nobody_along(broken):
    worker = decode_worker()
    async with gateway(worker) as (members, _):
        members.add("d0:1")
        await until(lambda: names(members) == ["d0"])
        member = members.get("d0")
        bad, good = Sink(*broken), Sink()
        member.sinks.update({1: bad, 2: good})
        for handle in (1, 2):
            await worker.tokens([5], handle=handle, position=0, report=LegReport(0), reason=FinishReason.STOP)
        assert [what[0] for what in good.heard] == ["tokens", "report", "finished"]
        await worker.fail(InternalError("x"), handle=1)
        assert ("failed", ErrorCode.INTERNAL) in bad.heard
        assert list(member.sinks) == [2]
        bad2, good2 = Sink("failed"), Sink()
        member.sinks.update({3: bad2, 4: good2})
        await worker.die()
        assert bad2.heard == good2.heard == [("failed", ErrorCode.WORKER_LOST)]
        assert member.sinks == {}


async def test_words_about_unknown_legs_are_ignored():
    worker = decode_worker()
    async with gateway(worker) as (members, _):
        members.add("d0:1")
        await until(lambda: names(members) == ["d0"])
        await worker.tokens([5], handle=99, position=0, report=LegReport(0), reason=FinishReason.STOP)
        await worker.fail(InternalError("x"), handle=99)
        assert len(worker.calls) == 1


async def test_a_report_comes_before_the_end_that_asks_for_it():
    async with fake_cluster() as cluster:
        session = await cluster.submit()
        await cluster.decode.tokens([5], report=LegReport(0, decode_s=9.0), reason=FinishReason.STOP)
        assert (await collect(session))[-1].usage.decode_s == 9.0


async def test_reservations_count_until_a_load_report_surely_knows_of_them(clock):
    async with fake_cluster() as cluster:
        session = await cluster.submit(range(10))
        member = cluster.members.get("d0")
        assert (member.view().reserved_tokens, member.view().reserved_sequences) == (10, 1)
        clock.now += members_module.RESERVATION_S / 2
        await cluster.decode.say(StepEvents(load=IDLE))
        assert member.view().reserved_tokens == 10, "sent before the worker can have heard of it"
        clock.now += members_module.RESERVATION_S
        assert member.view().reserved_tokens == 10
        await cluster.decode.say(StepEvents(load=BUSY))
        assert (member.view().reserved_tokens, member.view().num_running) == (0, 1)
        await session.aclose()


async def test_a_pair_is_priced_at_the_rate_that_its_decode_worker_tells():
    slow = tuple(OwnerRate(f"p{n}", 1e8 if n == 0 else 1e9) for n in range(3))
    async with fake_cluster(prefill=3) as cluster:
        member = cluster.members.get("d0")
        await cluster.decode.say(StepEvents(load=replace(IDLE, transfer_bytes_per_s=5.0)))
        assert (member.view().transfer_bytes_per_s, member.view().pairs) == (5.0, NO_PAIRS)
        await cluster.decode.say(StepEvents(load=replace(IDLE, owners=slow)))
        await cluster.decode.say(StepEvents(load=IDLE))
        assert (member.view().transfer_bytes_per_s, member.view().pairs.others) == (1e9, {"p0": 1e8})
        session = await cluster.submit(range(100))
        prefill, _ = cluster.pair_of(session)
        assert prefill is cluster.prefills[1], "the first has the slow link"
        await session.aclose()
        await cluster.decode.say(StepEvents(load=replace(IDLE, owners=())))
        assert member.view().pairs == NO_PAIRS


async def test_ledgers_leave_out_whoever_does_not_answer(caplog):
    async with gateway(decode_worker(), decode_worker("d1")) as (members, _):
        members.add("d0:1")
        members.add("d1:1")
        await until(lambda: len(names(members)) == 2)

        async def silent():
            raise WorkerLostError("d1:1: silent")

        members.get("d1").peer.ledger = silent
        assert [report.worker_id for report in await members.ledgers()] == ["d0"]
        assert "d1:1: silent" in caplog.text


# -- the index --------------------------------------------------------------------------------------------------------


async def test_a_worker_that_attaches_is_asked_for_all_it_has():
    worker = decode_worker()
    worker.snapshot = published(b"a", b"b", first=7)
    async with gateway(worker) as (members, _):
        members.add("d0:1")
        await until(lambda: members.feeds._index.num_blocks("d0") == 2)
        await worker.say(StepEvents(kv_events=published(b"c", first=7)))
        assert (members.feeds._index.num_blocks("d0"), worker.num_snapshots) == (3, 1)
        members.remove("d0:1")
        await until(lambda: members.feeds._index.num_blocks("d0") == 0)


async def test_a_gap_in_the_events_asks_for_a_snapshot():
    worker = decode_worker()
    async with gateway(worker) as (members, _):
        members.add("d0:1")
        await until(lambda: worker.num_snapshots == 1)
        await settle()
        await worker.say(StepEvents(kv_events=published(b"a")))
        worker.snapshot = published(b"a", b"b", b"c", first=3)
        await worker.say(StepEvents(kv_events=published(b"d", first=3)))
        await until(lambda: members.feeds._index.num_blocks("d0") == 4)
        assert worker.num_snapshots == 2


async def test_events_that_come_while_a_snapshot_travels_wait_for_it():
    worker = decode_worker()
    worker.may_snapshot.clear()
    worker.snapshot = published(b"a", b"b", first=2)
    async with gateway(worker) as (members, _):
        members.add("d0:1")
        await until(lambda: worker.num_snapshots == 1)
        for number, block_hash in enumerate([b"b", b"c", b"d"], start=1):
            await worker.say(StepEvents(kv_events=published(block_hash, first=number)))
        worker.may_snapshot.set()
        await until(lambda: members.feeds._index.num_blocks("d0") == 4)
        await settle()
        assert worker.num_snapshots == 1, "no second snapshot is needed"


async def test_a_snapshot_that_fails_is_asked_for_again_at_the_next_event(caplog):
    worker = decode_worker()
    worker.snapshot_error = WorkerLostError("d0:1: reset")
    async with gateway(worker) as (members, _):
        members.add("d0:1")
        await until(lambda: "snapshot d0 failed: d0:1: reset" in caplog.text)
        worker.snapshot_error, worker.snapshot = None, published(b"a", b"b", first=5)
        await worker.say(StepEvents(kv_events=published(b"b", first=4)))
        await until(lambda: members.feeds._index.num_blocks("d0") == 2)


async def test_a_snapshot_that_comes_after_the_worker_has_gone_brings_nothing_back():
    worker = decode_worker()
    worker.may_snapshot.clear()
    worker.snapshot = published(b"a", first=1)
    async with gateway(worker) as (members, network):
        members.add("d0:1")
        await until(lambda: worker.num_snapshots == 1)
        del network.workers["d0:1"]
        await worker.die()
        worker.may_snapshot.set()
        await settle()
        assert members.feeds._index.num_blocks("d0") == 0
        assert repr(members.feeds._index) == "<CompactIndex >"

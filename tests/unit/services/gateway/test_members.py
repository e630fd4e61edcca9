"""Workers come, go, hang and come back. Played by fake workers on a fake network."""

import asyncio
import logging
from contextlib import asynccontextmanager

import pytest

from services.gateway import members as members_module
from services.gateway import watch as watch_module
from services.gateway.members import Members
from tailrace.errors import ErrorCode, InternalError, WorkerLostError
from tailrace.index.memory import MemoryIndex
from tailrace.kv.events import KVEvent, KVEventKind
from tailrace.messages import KvEventBatch, LegReport, Load, StepEvents
from tailrace.types import FinishReason, Role
from tests.helpers.fake_members import (
    DIGEST,
    IDLE,
    SECRET,
    FakeNetwork,
    FakeWorker,
    collect,
    events_and_error,
    fake_cluster,
    prose,
    settle,
    until,
    worker_info,
)

BUSY = Load(num_running=1, total_blocks=100, free_blocks=99)


def published(*hashes, first=0):
    return KvEventBatch(1, first, [KVEvent(KVEventKind.PUBLISH, block_hash) for block_hash in hashes])


def names(members):
    return sorted(member.info.worker_id for member in members.all())


@asynccontextmanager
async def gateway(*workers, reattach_s=0.001):
    """Members that know no address yet, on a network with these workers."""
    network = FakeNetwork(*workers)
    with network.used(reattach_s):
        members = Members(gateway_id="g", epoch=1, secret=SECRET, index=MemoryIndex(), model_digest=DIGEST)
        try:
            yield members, network
        finally:
            await members.close()


def decode_worker(name="d0", **fields):
    return FakeWorker(worker_info(name, Role.DECODE, **fields))


# -- coming and going -------------------------------------------------------------------------------------------------


async def test_a_worker_is_there_from_its_first_event_to_the_end_of_its_stream():
    worker = decode_worker()
    async with gateway(worker) as (members, network):
        lost = []
        members.on_lost = lost.append
        members.add("d0:1")
        await until(lambda: names(members) == ["d0"])
        assert members.get("d0").load == IDLE
        assert (members.of(Role.DECODE), members.of(Role.PREFILL)) == (members.all(), [])
        del network.workers["d0:1"]
        await worker.die()
        assert names(members) == []
        assert lost == [Role.DECODE]
        with pytest.raises(WorkerLostError, match="d0 is gone"):
            members.get("d0")
        assert network.peers[0].is_closed


async def test_an_address_is_tried_until_somebody_answers_and_again_when_he_has_gone():
    worker = decode_worker()
    async with gateway() as (members, network):
        members.add("d0:1")
        await until(lambda: len(network.peers) >= 3)
        network.workers["d0:1"] = worker
        await until(lambda: names(members) == ["d0"])
        await worker.die()
        await until(lambda: len(worker.calls) == 2 and names(members) == ["d0"])


async def test_an_address_added_twice_stays_until_it_is_removed_twice():
    worker = decode_worker()
    async with gateway(worker) as (members, _):
        members.add("d0:1")
        members.add("d0:1")
        await until(lambda: names(members) == ["d0"])
        members.remove("d0:1")
        await settle()
        assert (names(members), len(worker.calls)) == (["d0"], 1)
        members.remove("d0:1")
        await until(lambda: names(members) == [])
        await asyncio.sleep(0.01)
        assert len(worker.calls) == 1, "nobody dials it any more"
        members.add("d0:1")
        await until(lambda: names(members) == ["d0"])


async def test_removing_an_address_that_nobody_added_is_no_error():
    async with gateway() as (members, _):
        members.remove("d0:1")
        members.remove("d0:1")
        members.add("d0:1")
        await settle()
        members.remove("d0:1")


async def test_a_worker_that_leaves_fails_its_legs_at_once():
    async with fake_cluster() as cluster:
        session = await cluster.submit()
        await cluster.decode.tokens([11])
        cluster.members.remove("d0:1")
        events, error = await events_and_error(session)
        assert (prose(events), error.code) == (["0@5: 11"], ErrorCode.UNAVAILABLE)


async def test_a_worker_that_restarts_takes_the_place_of_its_former_life():
    old, new = decode_worker(), decode_worker(epoch=2, address="elsewhere:1")
    async with gateway(old, new) as (members, _):
        members.add("d0:1")
        await until(lambda: names(members) == ["d0"])
        members.add("elsewhere:1")
        await until(lambda: members.get("d0").info.epoch == 2)
        await until(lambda: not old.calls[0].is_open)
        await until(lambda: len(old.calls) >= 3)
        assert members.get("d0").info.epoch == 2, "the former life is refused while the new one is there"
        assert len(new.calls) == 1


async def test_a_worker_with_two_addresses_is_attached_by_one_and_by_the_other_when_that_fails():
    """The worker itself drops its older stream: whoever opens one anew must know when not to."""
    one = decode_worker(address="127.0.0.1:1")
    other = FakeWorker(one.info)
    async with gateway(one) as (members, network):
        network.workers["localhost:1"] = other
        members.add("127.0.0.1:1")
        await until(lambda: names(members) == ["d0"])
        members.add("localhost:1")
        await until(lambda: other.calls)
        await asyncio.sleep(0.02)
        assert (len(one.calls), len(other.calls)) == (1, 1)
        assert members.get("d0").peer.address == "localhost:1"
        del network.workers["localhost:1"]
        await other.die()
        await asyncio.sleep(0.02)
        assert members.get("d0").peer.address == "127.0.0.1:1"


async def test_closing_ends_every_stream():
    async with gateway(decode_worker(), decode_worker("d1")) as (members, network):
        members.add("d0:1")
        members.add("d1:1")
        await until(lambda: len(names(members)) == 2)
        await members.close()
        assert names(members) == []
        assert all(peer.is_closed for peer in network.peers)


# -- who is refused ---------------------------------------------------------------------------------------------------


async def test_a_worker_of_another_model_is_refused_once_in_the_log(caplog):
    caplog.set_level(logging.DEBUG)
    worker = decode_worker(model_digest="another model")
    async with gateway(worker) as (members, _):
        members.add("d0:1")
        await until(lambda: len(worker.calls) == 3)
        assert names(members) == []
    told = [record for record in caplog.records if "serves another model" in record.message]
    assert f"model_digest: gateway={DIGEST} worker=another model" in told[0].message
    assert [record.levelno for record in told[:3]] == [logging.WARNING, logging.DEBUG, logging.DEBUG]


@pytest.mark.parametrize("order", [["p0:1", "d0:1"], ["d0:1", "p0:1"]])
async def test_a_pair_that_cannot_work_is_named_with_the_field(caplog, order):
    prefill = FakeWorker(worker_info("p0", Role.PREFILL, kv_dtype="float16"))
    async with gateway(prefill, decode_worker()) as (members, _):
        for count, address in enumerate(order, start=1):
            members.add(address)
            await until(lambda count=count: len(names(members)) == count)
    warnings = [record.message for record in caplog.records if "cannot be paired" in record.message]
    assert warnings == ["p0 and d0 cannot be paired (owner, needer): kv_dtype: owner=float16 needer=float32"]


async def test_a_stream_that_does_not_say_whose_it_is_is_closed(caplog):
    class Nameless(FakeWorker):
        def __post_init__(self):
            super().__post_init__()
            self.info = None

    worker = decode_worker()
    nameless = Nameless(worker.info)
    async with gateway() as (members, network):
        network.workers["d0:1"] = nameless
        members.add("d0:1")
        await until(lambda: len(nameless.calls) == 2)
        assert names(members) == []
        assert not nameless.calls[0].is_open
    assert "does not say who the worker is" in caplog.text


# -- who is cut -------------------------------------------------------------------------------------------------------


async def test_a_silent_worker_is_cut(monkeypatch):
    monkeypatch.setattr(members_module, "PEER_LOSS_S", 0.03)
    worker = decode_worker()
    async with gateway(worker) as (members, _):
        members.add("d0:1")
        await until(lambda: names(members) == ["d0"])
        await asyncio.sleep(0.02)
        await worker.say(StepEvents())
        await asyncio.sleep(0.02)
        assert (names(members), len(worker.calls)) == (["d0"], 1), "it has spoken in time"
        await until(lambda: not worker.calls[0].is_open)
        await until(lambda: len(worker.calls) == 2)


class Clock:
    """Stands in for the time of both modules."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(members_module, "time", clock)
    monkeypatch.setattr(watch_module, "time", clock)
    return clock


async def test_a_worker_with_work_to_do_whose_counter_stands_still_is_nudged_and_then_hung(clock):
    worker = decode_worker()
    async with gateway(worker) as (members, _):
        members.add("d0:1")
        await until(lambda: names(members) == ["d0"])
        first = worker.call
        await worker.say(StepEvents(step=7, load=BUSY))
        clock.now += watch_module.NUDGE_S - 1
        await worker.say(StepEvents(step=7))
        await settle()
        assert worker.num_ledgers == 0
        for _ in range(2):
            clock.now += 2
            await worker.say(StepEvents(step=7))
            await settle()
        assert (worker.num_ledgers, first.is_open) == (1, True), "asked once"
        clock.now += watch_module.HUNG_S
        await worker.say(StepEvents(step=7))
        assert not first.is_open


async def test_a_worker_that_steps_when_it_is_nudged_only_waits_for_others(clock):
    worker = decode_worker()
    async with gateway(worker) as (members, _):
        members.add("d0:1")
        await until(lambda: names(members) == ["d0"])
        await worker.say(StepEvents(step=7, load=Load(num_waiting=3, total_blocks=100)))
        for step in range(8, 12):
            clock.now += watch_module.NUDGE_S + 1
            await worker.say(StepEvents(step=step - 1))
            await worker.say(StepEvents(step=step))
        await settle()
        assert (worker.num_ledgers, len(worker.calls)) == (4, 1)


async def test_an_idle_worker_may_stand_still_for_ever(clock):
    worker = decode_worker()
    async with gateway(worker) as (members, _):
        members.add("d0:1")
        await until(lambda: names(members) == ["d0"])
        for _ in range(3):
            clock.now += 10 * watch_module.HUNG_S
            await worker.say(StepEvents(step=7, load=IDLE))
        await worker.say(StepEvents(step=7, load=BUSY))
        assert (worker.num_ledgers, len(worker.calls)) == (0, 1), "work has only just come"


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
        await until(lambda: members._index.num_blocks("d0") == 2)
        await worker.say(StepEvents(kv_events=published(b"c", first=7)))
        assert (members._index.num_blocks("d0"), worker.num_snapshots) == (3, 1)
        members.remove("d0:1")
        await until(lambda: members._index.num_blocks("d0") == 0)


async def test_a_gap_in_the_events_asks_for_a_snapshot():
    worker = decode_worker()
    async with gateway(worker) as (members, _):
        members.add("d0:1")
        await until(lambda: worker.num_snapshots == 1)
        await settle()
        await worker.say(StepEvents(kv_events=published(b"a")))
        worker.snapshot = published(b"a", b"b", b"c", first=3)
        await worker.say(StepEvents(kv_events=published(b"d", first=3)))
        await until(lambda: members._index.num_blocks("d0") == 4)
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
        await until(lambda: members._index.num_blocks("d0") == 4)
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
        await until(lambda: members._index.num_blocks("d0") == 2)


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
        assert members._index.num_blocks("d0") == 0
        assert repr(members._index) == "<MemoryIndex 0 blocks: >"

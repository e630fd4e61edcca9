"""Workers come, go, hang and come back. Played by fake workers on a fake network."""

import asyncio
import logging

import pytest

from services.gateway import members as members_module
from services.gateway import watch as watch_module
from tailrace.errors import ErrorCode, WorkerLostError
from tailrace.messages import Load, StepEvents
from tailrace.types import Role
from tests.helpers.attached_members import BUSY, decode_worker, gateway, names
from tests.helpers.fake_members import (
    DIGEST,
    IDLE,
    FakeWorker,
    events_and_error,
    fake_cluster,
    prose,
    settle,
    until,
    worker_info,
)

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
    monkeypatch.setattr(members_module, "PEER_LOSS_S", 0.3)
    worker = decode_worker()
    async with gateway(worker) as (members, _):
        members.add("d0:1")
        await until(lambda: names(members) == ["d0"])
        await asyncio.sleep(0.18)
        await worker.say(StepEvents())
        await asyncio.sleep(0.18)
        assert (names(members), len(worker.calls)) == (["d0"], 1), "it has spoken in time"
        await until(lambda: not worker.calls[0].is_open)
        await until(lambda: len(worker.calls) == 2)


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

"""Routing, starting again what was lost, and the limits of both. Played by fake workers."""

import asyncio
import itertools

import pytest

from services.gateway import dispatcher as dispatcher_module
from tailrace.errors import (
    ErrorCode,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
    WorkerLostError,
)
from tailrace.kv.events import KVEvents
from tailrace.kv.hashing import chain_seed, hash_blocks
from tailrace.messages import KvEventBatch, LegReport, Load, StepEvents
from tailrace.types import FinishReason, SamplingParams
from tests.helpers.fake_members import (
    BLOCK,
    LAYOUT,
    collect,
    events_and_error,
    fake_cluster,
    prose,
    settle,
    until,
)

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
GONE = WorkerLostError("gone")
FULL = OverloadedError("full")


def started(submission):
    return submission.tokens, submission.num_prompt_tokens, submission.choices, submission.attempt


# -- refused before anything is accepted ------------------------------------------------------------------------------


async def test_more_than_max_concurrent_requests_are_refused_until_one_ends():
    async with fake_cluster(max_concurrent=2) as cluster:
        first, second = await cluster.submit(), await cluster.submit()
        with pytest.raises(OverloadedError, match="2 requests are running") as caught:
            await cluster.submit()
        assert caught.value.retry_after_s > 0
        await first.aclose()
        third = await cluster.submit()
        await second.aclose()
        await third.aclose()


async def test_without_a_decode_worker_nobody_can_serve():
    async with fake_cluster(decode=0) as cluster:
        with pytest.raises(UnavailableError, match="no decode worker") as caught:
            await cluster.submit()
        assert caught.value.retry_after_s > 0


async def test_workers_that_drain_take_nothing():
    async with fake_cluster(load=Load(total_blocks=100, free_blocks=100, draining=True)) as cluster:
        with pytest.raises(UnavailableError, match="no pair"):
            await cluster.submit()


@pytest.mark.parametrize(("num_tokens", "fits"), [(9 * BLOCK, True), (9 * BLOCK + 1, False), (10 * BLOCK, False)])
async def test_a_prompt_that_no_pool_can_hold_is_the_clients_mistake(num_tokens, fits):
    async with fake_cluster(load=Load(total_blocks=10, free_blocks=10)) as cluster:
        if fits:
            await (await cluster.submit(range(num_tokens))).aclose()
            return
        with pytest.raises(InvalidRequestError, match=rf"{num_tokens} tokens; the largest worker holds 36") as caught:
            await cluster.submit(range(num_tokens))
        assert caught.value.param == "prompt"


async def test_without_a_prefill_worker_decode_computes_the_prompt():
    async with fake_cluster(prefill=0) as cluster:
        session = await cluster.submit(range(20))
        assert cluster.decode.last.source is None
        await session.aclose()


async def test_a_prompt_goes_where_it_is_cached():
    async with fake_cluster(prefill=3) as cluster:
        prompt = list(range(40))
        for salt, worker in (("", cluster.prefills[2]), ("salt", cluster.prefills[1])):
            hashes = hash_blocks(prompt, BLOCK, chain_seed(LAYOUT.fingerprint, "", salt))
            await worker.say(StepEvents(kv_events=KvEventBatch(1, 0, KVEvents.published(hashes))))
        plain, salted = await cluster.submit(prompt), await cluster.submit(prompt, cache_salt="salt")
        assert cluster.pair_of(plain)[0] is cluster.prefills[2]
        assert cluster.pair_of(salted)[0] is cluster.prefills[1]
        await plain.aclose()
        await salted.aclose()


async def test_submissions_that_no_report_knows_of_yet_count_as_load():
    async with fake_cluster(prefill=2, decode=2) as cluster:
        sessions = [await cluster.submit() for _ in range(4)]
        assert [len(worker.submissions) for worker in cluster.prefills + cluster.decodes] == [2, 2, 2, 2]
        for session in sessions:
            await session.aclose()


async def test_a_prompt_counts_as_queue_and_as_cached_until_its_worker_has_computed_it():
    async with fake_cluster(prefill=2) as cluster:
        first = await cluster.submit(range(200))
        worker, _ = cluster.pair_of(first)
        queues = lambda: {t.prefill_id: (t.queue_s > 0, t.hit_blocks) for t in cluster.dry_run(range(204)).terms}  # noqa: E731
        other = next(w for w in cluster.prefills if w is not worker)
        ids = worker.info.worker_id, other.info.worker_id
        assert queues() == {ids[0]: (True, 200 // BLOCK), ids[1]: (False, 0)}
        await worker.tokens([11], report=LegReport(0, prefill_s=0.1))
        # No event says yet that the blocks are cached.
        assert queues() == {ids[0]: (False, 0), ids[1]: (False, 0)}
        await first.aclose()


async def test_a_prompt_that_its_decode_worker_computes_counts_as_queue_until_the_first_token():
    """The worker reports when the answer ends: all that it writes would look like a queue."""
    async with fake_cluster(prefill=0) as cluster:
        first = await cluster.submit(range(200))
        queue_s = lambda: cluster.dry_run(range(204)).chosen.queue_s  # noqa: E731
        assert queue_s() > 0
        await cluster.decode.tokens([11])
        assert queue_s() == 0
        assert not first.is_over
        await first.aclose()


async def test_another_policy_routes_by_its_own_rule():
    async with fake_cluster(prefill=3, routing_policy="round-robin") as cluster:
        sessions = [await cluster.submit(range(n)) for n in (200, 8, 8, 8)]
        taken = [cluster.pair_of(session)[0] for session in sessions]
        assert taken == [*cluster.prefills, cluster.prefills[0]]
        for session in sessions:
            await session.aclose()


# -- lost and started again -------------------------------------------------------------------------------------------


async def test_a_lost_decode_worker_is_replaced_and_told_what_was_released():
    async with fake_cluster(decode=2) as cluster:
        sampling = SamplingParams(max_tokens=8, seed=41, temperature=0.8)
        session = await cluster.submit(sampling=sampling)
        _, victim = cluster.pair_of(session)
        await cluster.prefill.tokens([11], report=LegReport(0))
        await victim.tokens([11, 12])
        await cluster.leave(victim)
        _, other = cluster.pair_of(session)
        assert other is not victim
        assert started(other.last) == ([1, 2, 3, 4, 5, 11, 12], 5, (0,), 1)
        assert other.last.sampling == sampling
        assert other.last.source.ticket != victim.last.source.ticket
        await cluster.prefill.tokens([13], report=LegReport(0))
        await other.tokens([13, 14], reason=STOP)
        assert prose(await collect(session)) == [
            *("0@5: 11", "0@6: 12", "0@7: 13", "0@8: 14"),
            *("0 ends: STOP", "usage"),
        ]


async def test_late_tokens_of_a_replaced_leg_are_heard_by_nobody():
    async with fake_cluster() as cluster:
        session = await cluster.submit()
        old = cluster.decode.last.handle
        await cluster.decode.tokens([11])
        await cluster.decode.fail(GONE)
        await until(lambda: len(cluster.decode.submissions) == 2)
        await cluster.decode.tokens([666, 667], handle=old, position=6, reason=STOP)
        await cluster.decode.fail(InvalidRequestError("late"), handle=old)
        assert (old, ()) in cluster.decode.cancels
        await cluster.decode.tokens([12], reason=STOP)
        assert prose(await collect(session)) == ["0@5: 11", "0@6: 12", "0 ends: STOP", "usage"]


async def test_prefill_lost_before_decode_has_joined_starts_the_pair_again():
    async with fake_cluster(prefill=2) as cluster:
        session = await cluster.submit()
        victim, _ = cluster.pair_of(session)
        await victim.tokens([11], report=LegReport(0))
        first = cluster.decode.last
        await cluster.leave(victim)
        assert (first.handle, ()) in cluster.decode.cancels
        assert cluster.pair_of(session)[0] is not victim
        assert started(cluster.decode.last) == ([1, 2, 3, 4, 5, 11], 5, (0,), 1)
        await session.aclose()


async def test_prefill_lost_after_decode_has_joined_is_not_missed():
    async with fake_cluster(prefill=2) as cluster:
        session = await cluster.submit()
        victim, _ = cluster.pair_of(session)
        await cluster.decode.tokens([11])
        await cluster.leave(victim)
        assert len(cluster.decode.submissions) == 1
        await cluster.decode.tokens([12], position=6, reason=STOP)
        assert prose(await collect(session)) == ["0@5: 11", "0@6: 12", "0 ends: STOP", "usage"]


async def test_choices_of_which_nothing_was_released_stay_together():
    async with fake_cluster() as cluster:
        session = await cluster.submit(num_choices=3)
        await cluster.decode.fail(GONE)
        await until(lambda: len(cluster.decode.submissions) == 2)
        assert started(cluster.decode.last) == ([1, 2, 3, 4, 5], 5, (0, 1, 2), 1)
        await session.aclose()


async def test_choices_that_have_begun_go_on_each_for_itself():
    async with fake_cluster(decode=2) as cluster:
        session = await cluster.submit(num_choices=4)
        _, victim = cluster.pair_of(session)
        for choice in (0, 2, 3):
            await victim.tokens([10 * choice + 1], choice=choice, reason=STOP if choice == 2 else None)
        await cluster.leave(victim)
        other = next(worker for worker in cluster.decodes if worker is not victim)
        assert [started(submission) for submission in other.submissions] == [
            ([1, 2, 3, 4, 5, 1], 5, (0,), 1),
            ([1, 2, 3, 4, 5], 5, (1,), 2),
            ([1, 2, 3, 4, 5, 31], 5, (3,), 3),
        ]
        for submission in other.submissions:
            choice, position = submission.choices[0], len(submission.tokens)
            report = LegReport(0, transfer_bytes=5, transport="nixl", decode_s=0.1 * (choice + 1))
            handle = submission.handle
            await other.tokens([99], choice=choice, position=position, handle=handle, report=report, reason=STOP)
        events = await collect(session)
        assert (events[-1].usage.transfer_bytes, events[-1].usage.decode_s) == (15, pytest.approx(0.4))
        assert events[-1].usage.completion_tokens == 6


async def test_a_replay_finds_its_own_prompt_cached_which_is_no_cache_hit_of_the_clients():
    async with fake_cluster() as cluster:
        session = await cluster.submit()
        await cluster.prefill.tokens([11], report=LegReport(0, prefill_s=0.2, cached_tokens=0))
        await cluster.decode.fail(GONE)
        await until(lambda: len(cluster.decode.submissions) == 2)
        await cluster.prefill.tokens([12], report=LegReport(0, cached_tokens=4, cached_by_tier={"worker": 4}))
        await cluster.decode.tokens([12], reason=STOP)
        usage = (await collect(session))[-1].usage
        assert (usage.cached_tokens, usage.cached_by_tier, usage.prefill_s) == (0, {}, 0.2)


async def test_cached_tokens_never_exceed_the_clients_prompt():
    async with fake_cluster() as cluster:
        session = await cluster.submit()
        report = LegReport(0, cached_tokens=8, cached_by_tier={"worker": 3, "cpu": 5})
        await cluster.prefill.tokens([11], report=report)
        await cluster.decode.tokens([11], reason=STOP)
        usage = (await collect(session))[-1].usage
        assert (usage.cached_tokens, usage.cached_by_tier) == (5, {"worker": 3, "cpu": 2})


async def test_a_request_is_not_tried_for_ever():
    async with fake_cluster() as cluster:
        codes = []
        cluster.dispatcher.on_retry = codes.append
        session = await cluster.submit()
        for attempt in range(dispatcher_module.MAX_RETRIES + 1):
            await until(lambda attempt=attempt: len(cluster.decode.submissions) == attempt + 1)
            await cluster.decode.fail(GONE)
        events, error = await events_and_error(session)
        assert (events, error) == ([], GONE)
        assert codes == [ErrorCode.WORKER_LOST] * dispatcher_module.MAX_RETRIES


async def test_a_loss_counts_once_however_many_choices_it_hits():
    async with fake_cluster(decode=2) as cluster:
        session = await cluster.submit(num_choices=4)
        _, victim = cluster.pair_of(session)
        for choice in range(4):
            await victim.tokens([choice], choice=choice)
        for loss in range(1, dispatcher_module.MAX_RETRIES + 1):
            await victim.die()
            _, victim = cluster.pair_of(session)
            assert len(victim.call.submissions) == 4
            assert [s.attempt for s in victim.call.submissions] == [4 * loss - 3 + i for i in range(4)]
            await until(lambda: len(cluster.members.all()) == 3)
        assert not session.is_over
        await session.aclose()


async def test_refusals_do_not_use_up_the_retries_of_losses():
    async with fake_cluster() as cluster:
        session = await cluster.submit()
        errors = [FULL] * (dispatcher_module.MAX_RETRIES + 3) + [GONE] * dispatcher_module.MAX_RETRIES
        for count, error in enumerate(errors, start=1):
            await cluster.decode.fail(error)
            await until(lambda count=count: len(cluster.decode.submissions) == count + 1)
        assert not session.is_over
        await session.aclose()


async def test_a_refused_request_waits_as_long_as_the_worker_asks_for(monkeypatch):
    pauses = []
    sleep = asyncio.sleep

    async def remembered(seconds):
        pauses.extend([seconds] if seconds else [])
        await sleep(0)

    async with fake_cluster() as cluster:
        session = await cluster.submit()
        monkeypatch.setattr(dispatcher_module, "MAX_REFUSALS", 3)
        monkeypatch.setattr(dispatcher_module.asyncio, "sleep", remembered)
        for count in itertools.count(1):
            await cluster.decode.fail(OverloadedError("full", retry_after_s=0.5))
            await until(lambda count=count: session.is_over or len(cluster.decode.submissions) == count + 1)
            if session.is_over:
                break
        monkeypatch.undo()
        _, error = await events_and_error(session)
        assert error.code is ErrorCode.OVERLOADED
        assert [pause for pause in pauses if pause == 0.5] == [0.5] * 3


async def test_a_pause_beyond_the_deadline_is_not_taken():
    async with fake_cluster() as cluster:
        session = await cluster.submit(deadline_s=5.0)
        await cluster.decode.fail(OverloadedError("full", retry_after_s=10.0))
        _, error = await events_and_error(session)
        assert error.code is ErrorCode.DEADLINE_EXCEEDED
        assert "full" in error.message


async def test_an_error_that_no_retry_can_mend_is_final():
    async with fake_cluster() as cluster:
        session = await cluster.submit()
        await cluster.decode.fail(InternalError("no logits"))
        _, error = await events_and_error(session)
        assert error.message == "no logits"
        assert len(cluster.decode.submissions) == 1


async def test_without_another_worker_the_client_hears_what_it_got_and_the_error():
    async with fake_cluster() as cluster:
        session = await cluster.submit()
        await cluster.decode.tokens([11])
        await cluster.leave(cluster.decode)
        events, error = await events_and_error(session)
        assert prose(events) == ["0@5: 11"]
        assert error.code is ErrorCode.UNAVAILABLE


async def test_the_deadline_ends_a_request_that_no_worker_ends(monkeypatch):
    monkeypatch.setattr(dispatcher_module, "DEADLINE_GRACE_S", 0.01)
    async with fake_cluster() as cluster:
        session = await cluster.submit(deadline_s=0.2)
        await cluster.decode.tokens([11])
        events, error = await events_and_error(session)
        assert prose(events) == ["0@5: 11"]
        assert error.code is ErrorCode.DEADLINE_EXCEEDED
        assert (cluster.decode.last.handle, ()) in cluster.decode.cancels


async def test_the_deadline_of_a_request_that_has_ended_disturbs_nobody(monkeypatch):
    monkeypatch.setattr(dispatcher_module, "DEADLINE_GRACE_S", 0.0)
    async with fake_cluster() as cluster:
        session = await cluster.submit(deadline_s=0.2)
        await cluster.decode.tokens([11], reason=STOP)
        await asyncio.sleep(0.3)
        assert prose(await collect(session)) == ["0@5: 11", "0 ends: STOP", "usage"]
        assert session.timer.cancelled()


# -- streams that have broken, and nobody has noticed yet -------------------------------------------------------------


async def test_a_worker_that_takes_no_submissions_is_given_up_and_another_one_tried():
    async with fake_cluster(decode=3) as cluster:
        cluster.decodes[0].is_deaf = cluster.decodes[1].is_deaf = True
        session = await cluster.submit()
        assert cluster.pair_of(session)[1] is cluster.decodes[2]
        await session.aclose()
        await until(lambda: len(cluster.decodes[0].calls) == 2)


async def test_when_every_worker_is_deaf_the_request_fails_and_nothing_is_left():
    async with fake_cluster() as cluster:
        cluster.decode.is_deaf = True
        session = await cluster.submit()
        _, error = await events_and_error(session)
        assert error.retryable
        handles = [submission.handle for submission in cluster.prefill.submissions]
        assert [handle for handle, _ in cluster.prefill.cancels] == handles


async def test_a_submit_that_is_cancelled_while_it_looks_for_another_worker_leaves_nothing_behind():
    async with fake_cluster(decode=2) as cluster:
        cluster.decodes[0].is_deaf = True
        task = asyncio.create_task(cluster.submit())
        await asyncio.sleep(0)
        assert cluster.dispatcher.num_running == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        cluster.assert_nothing_held()


async def test_of_several_groups_only_those_not_started_are_tried_again():
    async with fake_cluster(prefill=0, decode=3) as cluster:
        session = await cluster.submit(num_choices=2)
        victim, healthy, deaf = cluster.decodes
        assert cluster.pair_of(session)[1] is victim
        for choice in range(2):
            await victim.tokens([choice], choice=choice)
        deaf.is_deaf = True
        await cluster.leave(victim)
        assert not deaf.calls[0].is_open, "it was tried, and given up"
        assert [started(submission)[2:] for submission in healthy.submissions] == [((0,), 1), ((1,), 3)]
        await session.aclose()


async def test_a_defect_while_starting_again_ends_the_request(monkeypatch):
    async with fake_cluster() as cluster:
        session = await cluster.submit()
        monkeypatch.setattr(cluster.dispatcher, "_route", lambda *args: 1 / 0)
        await cluster.decode.fail(GONE)
        _, error = await events_and_error(session)
        assert error.code is ErrorCode.INTERNAL


async def test_whoever_watches_cannot_fail_a_request():
    async with fake_cluster() as cluster:
        seen = []

        def broken(session):
            seen.append(session.life.state.value)
            raise RuntimeError("a defect of a watcher")

        cluster.dispatcher.on_begun = cluster.dispatcher.on_ended = broken
        session = await cluster.submit()
        await cluster.decode.tokens([11], reason=STOP)
        assert prose(await collect(session))[-1] == "usage"
        assert seen == ["received", "finished"]


async def test_a_cancelled_request_is_not_started_again():
    async with fake_cluster() as cluster:
        session = await cluster.submit()
        await cluster.decode.fail(OverloadedError("full", retry_after_s=0.01))
        await session.aclose()
        await asyncio.sleep(0.03)
        assert len(cluster.decode.submissions) == 1
        await settle()

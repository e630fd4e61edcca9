"""One request: tokens in order and each once, its ends, and nothing left behind. Played by fake workers."""

import pytest

from tailrace.errors import ErrorCode, InternalError, InvalidRequestError
from tailrace.kv.events import KVEvents
from tailrace.kv.hashing import chain_seed, hash_blocks
from tailrace.lifecycle import RequestState
from tailrace.messages import ChoiceFinished, KvEventBatch, LegReport, StepEvents
from tailrace.types import FinishReason, SamplingParams, TokenLogprob
from tests.helpers.fake_members import (
    BLOCK,
    LAYOUT,
    Finished,
    Heard,
    collect,
    events_and_error,
    fake_cluster,
    prose,
    settle,
)

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


def states(session):
    return [state.value for state, _ in session.life.moves]


async def test_the_first_token_told_by_both_legs_is_released_once():
    async with fake_cluster() as cluster:
        session = await cluster.submit()
        await cluster.prefill.tokens([11], report=LegReport(0, queue_s=0.1, prefill_s=0.2))
        await cluster.decode.tokens([11, 12])
        await cluster.decode.tokens([13], position=7, reason=LENGTH)
        assert prose(await collect(session)) == ["0@5: 11", "0@6: 12", "0@7: 13", "0 ends: LENGTH", "usage"]
        expected = ["received", "routed", "queued", "prefilling", "transferring", "decoding", "finished"]
        assert states(session) == expected


async def test_the_decode_leg_may_be_the_faster_one():
    async with fake_cluster() as cluster:
        session = await cluster.submit()
        await cluster.decode.tokens([11, 12])
        await cluster.prefill.tokens([11], report=LegReport(0, prefill_s=0.2))
        await cluster.decode.tokens([], reason=STOP)
        assert prose(await collect(session)) == ["0@5: 11", "0@6: 12", "0 ends: STOP", "usage"]
        assert session.usage.prefill_s == 0.2


async def test_both_legs_get_the_same_request_and_decode_is_told_where_its_blocks_are():
    async with fake_cluster() as cluster:
        session = await cluster.submit(range(5), num_choices=2, priority=3, cache_salt="salt", traceparent="t")
        prefill, decode = cluster.prefill.last, cluster.decode.last
        assert prefill.handle != decode.handle
        assert (prefill.source, decode.ticket) == (None, b"")
        assert decode.source.ticket == prefill.ticket != b""
        assert (decode.source.worker_id, decode.source.address) == ("p0", "p0:1")
        for leg in (prefill, decode):
            assert (leg.tokens, leg.num_prompt_tokens, leg.choices) == ([0, 1, 2, 3, 4], 5, (0, 1))
            assert (leg.priority, leg.cache_salt, leg.traceparent, leg.attempt) == (3, "salt", "t", 0)
            assert (leg.request_id, leg.sampling) == (session.wire_id, session.request.sampling)
            assert 0 < leg.deadline_s <= session.request.deadline_s
        await session.aclose()


async def test_logprobs_stay_with_their_tokens():
    async with fake_cluster() as cluster:
        session = await cluster.submit(sampling=SamplingParams(seed=7, logprobs=0))
        await cluster.prefill.tokens([11], logprobs=[TokenLogprob(-1.0)])
        await cluster.decode.tokens([11, 12], logprobs=[TokenLogprob(-1.0), TokenLogprob(-2.0)], reason=STOP)
        events = await collect(session)
        assert [e.logprobs for e in events[:2]] == [[TokenLogprob(-1.0)], [TokenLogprob(-2.0)]]


async def test_choices_end_each_for_itself_and_the_last_one_ends_the_request():
    async with fake_cluster() as cluster:
        session = await cluster.submit(num_choices=2)
        await cluster.prefill.tokens([11], choice=0, reason=STOP)
        await cluster.prefill.tokens([21], choice=1)
        assert not session.is_over
        await cluster.decode.tokens([11], choice=0, reason=STOP)
        await cluster.decode.tokens([21, 22], choice=1, reason=LENGTH)
        lines = prose(await collect(session))
        assert lines == ["0@5: 11", "0 ends: STOP", "1@5: 21", "1@6: 22", "1 ends: LENGTH", "usage"]


async def test_a_request_that_its_first_token_ends_needs_no_decode():
    async with fake_cluster() as cluster:
        session = await cluster.submit()
        await cluster.prefill.tokens([2], reason=STOP, report=LegReport(0, prefill_s=0.3, cached_tokens=4))
        events = await collect(session)
        assert prose(events) == ["0@5: 2", "0 ends: STOP", "usage"]
        assert (events[-1].usage.cached_tokens, events[-1].usage.transport) == (4, "")
        assert cluster.decode.cancels == [(cluster.decode.last.handle, ())]


async def test_nothing_of_a_choice_comes_after_its_end():
    async with fake_cluster() as cluster:
        session = await cluster.submit(num_choices=2)
        await cluster.decode.tokens([11], choice=0, reason=STOP)
        await cluster.decode.tokens([12], choice=0, position=6, reason=LENGTH)
        await cluster.decode.tokens([21], choice=1, reason=STOP)
        assert prose(await collect(session)) == ["0@5: 11", "0 ends: STOP", "1@5: 21", "1 ends: STOP", "usage"]


async def test_of_a_run_of_tokens_only_the_new_ones_are_released_with_their_logprobs():
    async with fake_cluster() as cluster:
        session = await cluster.submit(sampling=SamplingParams(seed=7, logprobs=0))
        leg = cluster.members.get("d0").sinks[cluster.decode.last.handle]
        leg.on_tokens(0, 5, [11, 12], [TokenLogprob(-1.0), TokenLogprob(-2.0)])
        leg.on_tokens(0, 5, [11, 12, 13], [TokenLogprob(-1.0), TokenLogprob(-2.0), TokenLogprob(-3.0)])
        leg.on_tokens(0, 6, [12], None)
        leg.on_finished(0, STOP)
        first, second, *rest = await collect(session)
        assert prose([first, second, *rest]) == ["0@5: 11 12", "0@7: 13", "0 ends: STOP", "usage"]
        assert [p.logprob for p in first.logprobs + second.logprobs] == [-1.0, -2.0, -3.0]


# -- finish_choice ----------------------------------------------------------------------------------------------------


async def test_finishing_a_choice_cancels_it_at_decode_only_and_drops_what_is_untold():
    async with fake_cluster() as cluster:
        session = await cluster.submit(num_choices=2)
        await cluster.prefill.tokens([11], choice=0)
        await cluster.decode.tokens([11, 12, 13], choice=0)
        await cluster.decode.tokens([21], choice=1)
        heard = Heard(session, stop=0)
        session.finish_choice(0)
        assert cluster.decode.cancels == [(cluster.decode.last.handle, (0,))]
        assert cluster.prefill.cancels == []
        await cluster.decode.tokens([14], choice=0, position=8)
        await cluster.decode.tokens([22], choice=1, position=6, reason=STOP)
        assert prose(heard.events) == ["0@5: 11", "1@5: 21", "1@6: 22", "1 ends: STOP", "usage"]
        assert heard.events[-1].usage.completion_tokens == 3, "one of choice 0 was told, two of choice 1"


async def test_what_comes_while_somebody_listens_is_told_within_the_worker_s_message():
    async with fake_cluster() as cluster:
        session = await cluster.submit(num_choices=2)
        heard = Heard(session, stop=0)
        assert heard.events == []
        await cluster.decode.tokens([11, 12], choice=0)
        await cluster.decode.tokens([21, 22], choice=1, reason=LENGTH)
        assert prose(heard.events) == ["0@5: 11", "1@5: 21", "1@6: 22", "1 ends: LENGTH", "usage"]
        assert cluster.decode.cancels[0] == (cluster.decode.last.handle, (0,))


async def test_finishing_the_last_choice_ends_the_request():
    async with fake_cluster() as cluster:
        session = await cluster.submit()
        await cluster.decode.tokens([11, 12])
        assert prose(Heard(session, stop=0).events) == ["0@5: 11", "usage"]
        assert session.life.state is RequestState.FINISHED
        assert cluster.prefill.cancels == [(cluster.prefill.last.handle, ())]


async def test_what_a_worker_ended_before_the_client_stopped_it_is_not_told_either():
    async with fake_cluster() as cluster:
        session = await cluster.submit()
        await cluster.decode.tokens([11])
        await cluster.decode.tokens([12, 13], position=6, reason=LENGTH)
        heard = Heard(session, stop=0)
        assert prose(heard.events) == ["0@5: 11", "usage"]
        assert heard.events[-1].usage.completion_tokens == 1


async def test_a_choice_that_ends_the_request_is_told_after_what_others_have_waiting():
    async with fake_cluster() as cluster:
        session = await cluster.submit(num_choices=2)
        await cluster.decode.tokens([11], choice=0)
        await cluster.decode.tokens([21], choice=1, reason=LENGTH)
        assert prose(Heard(session, stop=0).events) == ["0@5: 11", "1@5: 21", "1 ends: LENGTH", "usage"]


async def test_finishing_a_choice_of_a_failed_request_is_no_error():
    async with fake_cluster() as cluster:
        session = await cluster.submit()
        await cluster.decode.fail(InvalidRequestError("no"))
        await settle()
        session.finish_choice(0)
        assert session.life.state is RequestState.FAILED


# -- aclose at every moment -------------------------------------------------------------------------------------------


async def nothing_yet(cluster):
    pass


async def prefill_done(cluster):
    await cluster.prefill.tokens([11], report=LegReport(0))


async def decoding(cluster):
    await prefill_done(cluster)
    await cluster.decode.tokens([11, 12])


@pytest.mark.parametrize("reach", [nothing_yet, prefill_done, decoding])
async def test_closing_cancels_decode_before_prefill_and_a_second_time_does_nothing(reach):
    async with fake_cluster() as cluster:
        session = await cluster.submit()
        await reach(cluster)
        await session.aclose()
        await session.aclose()
        assert session.life.state is RequestState.CANCELLED
        assert cluster.decode.cancels == [(cluster.decode.last.handle, ())]
        assert cluster.prefill.cancels == [(cluster.prefill.last.handle, ())]
        cluster.assert_nothing_held()


async def test_closing_at_the_end_says_nothing_more_to_the_workers():
    async with fake_cluster() as cluster:
        session = await cluster.submit()
        await cluster.decode.tokens([11], reason=STOP)
        told = (list(cluster.decode.cancels), list(cluster.prefill.cancels))
        await collect(session)
        await session.aclose()
        assert session.life.state is RequestState.FINISHED
        assert (cluster.decode.cancels, cluster.prefill.cancels) == told


async def test_closing_a_request_that_has_failed_is_no_error():
    async with fake_cluster() as cluster:
        session = await cluster.submit()
        await cluster.decode.fail(InvalidRequestError("no"))
        await settle()
        await session.aclose()
        assert session.life.state is RequestState.FAILED


async def test_after_closing_the_listener_hears_nothing():
    async with fake_cluster() as cluster:
        session = await cluster.submit()
        heard = Heard(session)
        await cluster.decode.tokens([11])
        leg = session._attempts[0].decode
        await session.aclose()
        leg.on_tokens(0, 6, [12], None)
        leg.on_finished(0, LENGTH)
        assert prose(heard.events) == ["0@5: 11"]
        assert not heard.has_ended.is_set()


async def test_a_listener_that_fails_fails_its_request_and_no_other():
    class Failing(Heard):
        def on_tokens(self, *_args):
            raise KeyError("a defect")

    async with fake_cluster() as cluster:
        broken, sound = await cluster.submit(), await cluster.submit()
        first, second = Failing(broken), Heard(sound)
        for submission in cluster.decode.submissions:
            await cluster.decode.tokens([11], handle=submission.handle, reason=LENGTH)
        await settle()
        assert isinstance(first.error, InternalError)
        assert "a defect" not in first.error.message
        assert prose(second.events) == ["0@5: 11", "0 ends: LENGTH", "usage"]


# -- terminal errors --------------------------------------------------------------------------------------------------


async def test_what_was_released_is_delivered_before_the_error():
    async with fake_cluster() as cluster:
        session = await cluster.submit()
        await cluster.decode.tokens([11, 12])
        await cluster.decode.fail(InvalidRequestError("too odd", param="prompt"))
        events, error = await events_and_error(session)
        assert prose(events) == ["0@5: 11", "0@6: 12"]
        assert (error.code, error.param) == (ErrorCode.INVALID_REQUEST, "prompt")
        assert session.life.state is RequestState.FAILED


async def test_a_gap_in_the_positions_fails_the_request():
    async with fake_cluster() as cluster:
        session = await cluster.submit()
        await cluster.decode.tokens([13], position=7)
        events, error = await events_and_error(session)
        assert events == []
        assert error.code is ErrorCode.INTERNAL


@pytest.mark.parametrize("choice", [2, 4_000_000_000])
async def test_a_worker_that_speaks_of_a_choice_it_was_not_given_fails_that_request_alone(choice):
    async with fake_cluster() as cluster:
        bad = await cluster.submit(num_choices=2)
        handle = cluster.decode.last.handle
        good = await cluster.submit()
        await cluster.decode.say(StepEvents(finished=[ChoiceFinished(handle, choice, STOP)]))
        _, error = await events_and_error(bad)
        assert error.code is ErrorCode.INTERNAL
        await cluster.decode.tokens([11], reason=STOP)
        assert prose(await collect(good)) == ["0@5: 11", "0 ends: STOP", "usage"]


async def test_a_failure_of_the_prefill_leg_after_decode_has_joined_changes_nothing():
    async with fake_cluster() as cluster:
        session = await cluster.submit()
        await cluster.decode.tokens([11])
        await cluster.prefill.fail(InternalError("late"))
        await cluster.decode.tokens([12], position=6, reason=STOP)
        assert prose(await collect(session)) == ["0@5: 11", "0@6: 12", "0 ends: STOP", "usage"]


# -- usage ------------------------------------------------------------------------------------------------------------


async def test_usage_takes_the_prompt_from_prefill_and_the_rest_from_decode():
    async with fake_cluster() as cluster:
        session = await cluster.submit()
        prompt = LegReport(0, queue_s=0.1, prefill_s=0.2, cached_tokens=4, cached_by_tier={"worker": 4})
        rest = LegReport(0, transfer_s=0.3, transfer_bytes=99, transport="nixl", decode_s=0.4)
        await cluster.prefill.tokens([11], report=prompt)
        await cluster.decode.tokens([11, 12], report=rest, reason=LENGTH)
        events = await collect(session)
        assert isinstance(events[-1], Finished)
        usage = events[-1].usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (5, 2, 4)
        assert (usage.queue_s, usage.prefill_s, usage.cached_by_tier) == (0.1, 0.2, {"worker": 4})
        assert (usage.transfer_s, usage.transfer_bytes, usage.transport, usage.decode_s) == (0.3, 99, "nixl", 0.4)
        assert 0 < usage.ttft_s < 5


async def test_usage_of_a_prompt_that_decode_computed_is_all_decodes():
    async with fake_cluster(prefill=0) as cluster:
        session = await cluster.submit()
        assert cluster.decode.last.source is None
        report = LegReport(0, queue_s=0.1, prefill_s=0.2, decode_s=0.4, cached_tokens=4, cached_by_tier={"worker": 4})
        await cluster.decode.tokens([11, 12], report=report, reason=LENGTH)
        usage = (await collect(session))[-1].usage
        assert (usage.queue_s, usage.prefill_s, usage.decode_s, usage.cached_tokens) == (0.1, 0.2, 0.4, 4)
        assert usage.transport == ""
        assert states(session) == ["received", "routed", "queued", "prefilling", "decoding", "finished"]


async def test_a_report_that_claims_more_time_than_has_passed_keeps_the_moves_in_order():
    async with fake_cluster() as cluster:
        session = await cluster.submit()
        await cluster.prefill.tokens([11], report=LegReport(0, prefill_s=1000.0))
        times = [at for _, at in session.life.moves]
        assert times == sorted(times)
        await session.aclose()


@pytest.mark.parametrize(
    ("cached", "told", "usage"),
    [
        (5, {"nvme": 2, "worker": 1, "peer": 2}, {"worker": 1, "peer": 2, "nvme": 2}),
        (3, {"nvme": 2, "worker": 1, "peer": 2}, {"worker": 1, "peer": 2}),
        (4, {}, {"worker": 4}),
        (4, {"cpu": 1}, {"cpu": 1, "worker": 3}),
        (0, {"worker": 3}, {}),
    ],
)
async def test_cached_tokens_by_tier_add_up_to_the_cached_tokens(cached, told, usage):
    async with fake_cluster() as cluster:
        session = await cluster.submit()
        await cluster.prefill.tokens([1], report=LegReport(0, cached_tokens=cached, cached_by_tier=told))
        await cluster.decode.tokens([1], reason=STOP)
        events = await collect(session)
        assert (events[-1].usage.cached_tokens, events[-1].usage.cached_by_tier) == (cached, usage)


async def test_a_replay_of_what_never_reported_counts_only_what_was_known_before():
    prompt = list(range(41))
    hashes = hash_blocks(prompt, BLOCK, chain_seed(LAYOUT.fingerprint, "", ""))
    async with fake_cluster(decode=2) as cluster:
        await cluster.prefill.say(StepEvents(kv_events=KvEventBatch(1, 0, KVEvents.published(hashes[:3]))))
        session = await cluster.submit(prompt)
        _, victim = cluster.pair_of(session)
        await cluster.leave(victim)
        await settle()
        # The first attempt computed all ten blocks before it was cancelled, and said nothing.
        await cluster.prefill.tokens([1], report=LegReport(0, cached_tokens=40, cached_by_tier={"worker": 40}))
        _, decode = cluster.pair_of(session)
        await decode.tokens([1], reason=STOP)
        usage = (await collect(session))[-1].usage
        assert (usage.cached_tokens, usage.cached_by_tier) == (3 * BLOCK, {"worker": 3 * BLOCK})

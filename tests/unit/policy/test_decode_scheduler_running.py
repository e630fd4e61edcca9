"""The running batch: local prefill beside it, growth, preemption, forks and ends, with exact plans.

Blocks of 4 tokens.
"""

import pytest

from tailrace.kv.hashing import hash_blocks
from tailrace.plan import BlockAppend, BlockCopy, Chunk
from tailrace.policy.request import StopRule
from tailrace.types import FinishReason, SamplingParams
from tests.helpers.decode_world import HASH_SEED, DecodeWorld, make_request

A = list(range(100, 140))
B = list(range(200, 240))
LONG = SamplingParams(max_tokens=20, ignore_eos=True, seed=5)


def local(world: DecodeWorld, tokens: list[int], **options: object) -> int:
    return world.submit_local(world.request(tokens, **{"sampling": LONG, **options})).id


# -- local prefill ----------------------------------------------------------------------------------------------------


def test_local_prefill_goes_in_chunks_with_what_the_batch_leaves_of_the_budget() -> None:
    world = DecodeWorld(budget=5)
    local(world, A[:4])
    world.step()
    local(world, B[:10])
    plan = world.step()
    assert (plan.decode, plan.chunks) == ([0], [Chunk(1, 0, 4)])
    plan = world.step()
    assert (plan.decode, plan.chunks) == ([0], [Chunk(1, 4, 8)])
    plan = world.step()
    assert (plan.decode, plan.chunks) == ([0], [Chunk(1, 8, 10, (0,))])
    assert world.step().decode == [0, 1]


def test_a_batch_as_wide_as_the_budget_leaves_local_prefill_waiting() -> None:
    world = DecodeWorld(budget=2, max_num_seqs=4)
    local(world, A[:1])
    local(world, B[:1])
    world.step()
    local(world, A[20:24], sampling=SamplingParams(max_tokens=2, ignore_eos=True))
    plan = world.step()
    assert (len(plan.decode), plan.chunks) == (2, [])
    world.run_to_end()
    world.check_answers()


def test_local_prefill_reuses_a_prefix_and_computes_at_least_a_token() -> None:
    world = DecodeWorld(budget=64)
    local(world, A[:8], sampling=SamplingParams(max_tokens=1))
    world.step()
    local(world, A[:8])
    plan = world.step()
    assert plan.chunks == [Chunk(0, 4, 8, (0,))]
    assert plan.started[0].blocks[0] == 0


def test_the_head_of_the_line_is_not_overtaken() -> None:
    world = DecodeWorld(num_blocks=6, budget=64)
    local(world, A[:12])
    world.step()
    local(world, B[:16])
    local(world, A[20:24])
    assert not world.step().started
    assert world.scheduler.num_waiting == 2


def test_priority_goes_first() -> None:
    world = DecodeWorld(budget=64, max_num_seqs=1)
    local(world, A[:4], priority=1)
    local(world, B[:4], priority=0)
    assert [start.tokens for start in world.step().started] == [B[:4]]


def test_choices_of_a_local_prompt_fork_from_its_last_chunk() -> None:
    world = DecodeWorld(budget=64)
    request_id = local(world, A[:6], choices=(0, 1))
    assert world.step().chunks == [Chunk(0, 0, 6, (0, 1))]
    plan = world.step()
    assert plan.copies == [BlockCopy(1, 2)]
    assert [(start.slot, start.choice, list(start.blocks)) for start in plan.started] == [(1, 1, [0, 2])]
    assert plan.decode == [0, 1]
    assert [len(world.answers[request_id, choice]) for choice in (0, 1)] == [2, 2]


def test_a_slot_whose_own_choice_was_cancelled_is_not_inherited() -> None:
    world = DecodeWorld(budget=4)
    request_id = local(world, A[:6], choices=(0, 1))
    world.step()
    world.cancel_choices(request_id, (0,))
    assert world.step().chunks == [Chunk(0, 4, 6, (1,))]
    plan = world.step()
    assert plan.released == [0]
    assert [(start.slot, start.choice) for start in plan.started] == [(0, 1)]
    world.run_to_end()
    world.check_answers()
    world.check_empty()


# -- growth and preemption --------------------------------------------------------------------------------------------


def test_a_sequence_grows_by_a_block_when_its_last_token_starts_one() -> None:
    world = DecodeWorld()
    local(world, A[:3])
    world.step()
    assert world.step().appended == []
    assert world.step().appended == [BlockAppend(0, 1, [1])]
    assert [bool(world.step().appended) for _ in range(4)] == [False, False, False, True]


def test_the_lowest_in_rank_gives_way_and_keeps_its_tokens() -> None:
    world = DecodeWorld(num_blocks=4, budget=64, max_model_len=16)
    first = local(world, A[:7])
    second = local(world, B[:7])
    for _ in range(2):
        world.step()
    assert world.pool.num_available == 0
    plan = world.step()
    assert world.scheduler.num_preempted == 1
    assert (plan.decode, plan.appended) == ([0], [BlockAppend(0, 2, [3])])
    assert plan.released == [1]
    assert world.scheduler.waiting_tokens == 9, "all of it is computed again, as far as it is not cached"
    assert (len(world.answers[first, 0]), len(world.answers[second, 0])) == (3, 2)
    assert str(world.pool.ledger()) == "active=3 cached=1", "its tail was evicted first"
    world.run_to_end()
    world.check_answers()
    world.check_empty()


def test_priority_decides_who_gives_way() -> None:
    world = DecodeWorld(num_blocks=4, budget=64, max_model_len=16)
    local(world, A[:7], priority=1)
    second = local(world, B[:7], priority=0)
    for _ in range(3):
        world.step()
    assert [s.request.id for s in world.scheduler.sequences()] == [second]


def test_whoever_grew_and_then_gave_way_is_not_told_to_the_runner() -> None:
    world = DecodeWorld(num_blocks=5, budget=64, max_model_len=20)
    local(world, A[:7], priority=1)
    world.step()
    second = local(world, B[:8], priority=0)
    world.step()
    plan = world.step()
    assert [append.slot for append in plan.appended] == [1], "slot 0 took the last block, and lost it again"
    assert [s.request.id for s in world.scheduler.sequences()] == [second]
    world.run_to_end()
    world.check_answers()


def test_local_prefill_leaves_a_block_for_each_running_sequence() -> None:
    world = DecodeWorld(num_blocks=6, budget=64)
    local(world, A[:2])
    world.step()
    too_big = local(world, B[:20])
    assert not world.step().started
    world.cancel(too_big)
    local(world, B[:16])
    assert len(world.step().started) == 1


def test_when_nobody_can_start_for_lack_of_a_block_the_lowest_in_rank_gives_way() -> None:
    world = DecodeWorld(num_blocks=6, budget=64)
    for tokens in (A[:8], B[:8]):
        assert world.book(world.request(tokens, sampling=LONG))
    for request_id in (1, 2):
        world.want(request_id)
    world.step()
    for request_id in (1, 2):
        world.start_read(request_id, 9)
        world.land(world.pulls[request_id])
        world.join(request_id)
    others = world.scheduler._pool.allocate(2)
    assert [start.tokens[:8] for start in world.step().started] == [A[:8]]
    assert world.scheduler.num_preempted == 1
    world.scheduler._pool.release(others or ())
    world.run_to_end()
    world.check_answers()
    world.check_empty()


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    world = DecodeWorld(num_blocks=6, budget=64, max_model_len=20)
    first = local(world, A[:7], sampling=SamplingParams(max_tokens=9, ignore_eos=True))
    local(world, B[:11], sampling=SamplingParams(max_tokens=8, ignore_eos=True))
    while not world.scheduler.num_preempted:
        world.step()
    cached = world.pool.ledger().cached
    assert cached > 0
    world.cancel(first)
    chunk = world.step().chunks[0]
    assert chunk.start == 4 * cached
    world.run_to_end()
    world.check_answers()


def test_a_pool_that_just_holds_one_sequence_serves_two_after_each_other() -> None:
    world = DecodeWorld(num_blocks=4, budget=8, max_model_len=16)
    for tokens in (A[:8], B[:8]):
        local(world, tokens)
    world.run_to_end()
    world.check_answers()
    assert len(world.reasons) == 2


# -- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "generated", "options", "reason"),
    [
        (0, 1, {}, FinishReason.STOP),
        (0, 1, {"ignore_eos": True}, None),
        (7, 1, {}, None),
        (7, 1, {"stop_token_ids": (7,)}, FinishReason.STOP),
        (7, 1, {"stop_token_ids": (7,), "ignore_eos": True}, FinishReason.STOP),
        (0, 3, {"min_tokens": 3}, None),
        (0, 4, {"min_tokens": 3}, FinishReason.STOP),
        (7, 3, {"min_tokens": 3, "stop_token_ids": (7,)}, None),
        (5, 10, {}, FinishReason.LENGTH),
        (5, 9, {}, None),
        (0, 10, {}, FinishReason.STOP),
        (0, 10, {"min_tokens": 10}, FinishReason.LENGTH),
        (5, 12, {"max_tokens": 50}, FinishReason.LENGTH),
        (5, 11, {"max_tokens": 50}, None),
    ],
)
def test_what_ends_a_choice(
    token: int, generated: int, options: dict[str, object], reason: FinishReason | None
) -> None:
    """A prompt of 8 tokens, the context is 20."""
    sampling = SamplingParams(**{"max_tokens": 10, **options})  # type: ignore[arg-type]
    request = make_request(1, A[:8], block_size=4, sampling=sampling)
    assert StopRule(frozenset({0}), 20).finish_reason(token, 8 + generated, request) is reason


def test_replayed_tokens_count_as_generated() -> None:
    request = make_request(1, A[:8], block_size=4, num_prompt_tokens=5, sampling=SamplingParams(max_tokens=4))
    assert StopRule(frozenset(), 20).finish_reason(5, 9, request) is FinishReason.LENGTH


def test_a_finished_sequence_frees_its_slot_and_leaves_its_full_blocks_cached() -> None:
    world = DecodeWorld()
    request_id = local(world, A[:7], sampling=SamplingParams(max_tokens=3, ignore_eos=True))
    for _ in range(3):
        world.step()
    assert world.reasons[request_id, 0] is FinishReason.LENGTH
    assert str(world.pool.ledger()) == "free=14 cached=2", "7 + 2 tokens were computed"
    assert world.step().released == [0]


def test_nobody_runs_past_the_context() -> None:
    world = DecodeWorld(num_blocks=3, max_model_len=12)
    request_id = local(world, A[:9])
    world.run_to_end()
    assert (len(world.answers[request_id, 0]), world.reasons[request_id, 0]) == (3, FinishReason.LENGTH)


# -- cancels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("whole", [True, False])
def test_dropped_waiting_computing_joining_or_running_everything_comes_back(steps: int, whole: bool) -> None:
    world = DecodeWorld(budget=4, max_num_seqs=2)
    request_id = local(world, A[:10], choices=(0, 1, 2))
    for _ in range(steps):
        world.step()
    if whole:
        world.cancel(request_id)
    else:
        for choice in (1, 0, 2):
            world.cancel_choices(request_id, (choice,))
            world.check()
    world.step()
    world.check_empty()


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("choice", [0, 1, 2])
def test_the_choices_that_stay_are_answered_in_full(steps: int, choice: int) -> None:
    world = DecodeWorld(budget=4, max_num_seqs=2)
    request_id = local(world, A[:10], choices=(0, 1, 2))
    for _ in range(steps):
        world.step()
    world.cancel_choices(request_id, (choice,))
    world.run_to_end()
    world.check_answers()
    assert {key[1] for key in world.reasons} == {0, 1, 2} - {choice}
    world.check_empty()


# -- what a store is offered ------------------------------------------------------------------------------------------


def chain(world: DecodeWorld, request_id: int, num_blocks: int, choice: int = 0) -> list[bytes]:
    """Hashes of the first blocks of a choice's prompt and answer."""
    tokens = [*world.requests[request_id].tokens, *world.answers[request_id, choice]]
    return hash_blocks(tokens[: 4 * num_blocks], 4, HASH_SEED)


def test_at_its_end_a_sequence_is_offered_with_its_answer_as_far_as_blocks_are_full() -> None:
    world = DecodeWorld(budget=64)
    request_id = local(world, A[:6], sampling=SamplingParams(max_tokens=7, ignore_eos=True))
    world.run_to_end()
    assert len(world.answers[request_id, 0]) == 7
    # Thirteen tokens: the KV of the last one was never computed.
    assert world.offered == [chain(world, request_id, 3)]
    assert world.pool.find_prefix(world.offered[0]) == [0, 1, 2]


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_a_prompt_that_ends_with_its_first_tokens_is_offered(num_tokens: int) -> None:
    world = DecodeWorld(budget=64)
    request_id = local(world, A[:9], choices=(0, 1), sampling=SamplingParams(max_tokens=num_tokens, ignore_eos=True))
    world.run_to_end()
    assert world.offered == [chain(world, request_id, 2)] * num_tokens


def test_choices_are_offered_each_with_the_prompt_that_they_share() -> None:
    world = DecodeWorld(budget=64)
    request_id = local(world, A[:8], choices=(0, 1), sampling=SamplingParams(max_tokens=6, ignore_eos=True))
    world.run_to_end()
    assert world.offered == [chain(world, request_id, 3, choice) for choice in (0, 1)]
    assert world.offered[0][:2] == world.offered[1][:2]


def test_whoever_gives_way_is_offered_with_what_it_has_computed() -> None:
    world = DecodeWorld(num_blocks=4, budget=64, max_model_len=16)
    local(world, A[:7])
    second = local(world, B[:7])
    while not world.scheduler.num_preempted:
        world.step()
    assert world.offered == [chain(world, second, 1)], "its second block went to who stayed"


def test_a_cancelled_answer_is_offered_when_its_blocks_are_about_to_go() -> None:
    world = DecodeWorld(num_blocks=8, budget=64, low_water=0.5, max_model_len=32)
    first = local(world, A[:6])
    for _ in range(4):
        world.step()
    world.cancel(first)
    world.settle()
    assert world.offered == [], "enough is free"
    local(world, B[:14], sampling=SamplingParams(max_tokens=1, ignore_eos=True))
    world.step()
    assert chain(world, first, 2) in world.offered
    world.run_to_end()
    assert world.offered.count(chain(world, first, 2)) == 1

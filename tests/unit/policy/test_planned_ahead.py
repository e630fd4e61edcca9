"""A step planned behind another that still computes, with exact plans. Blocks of 4 tokens."""

import pytest

from tailrace.plan import BlockAppend, Chunk
from tailrace.types import FinishReason, SamplingParams
from tests.helpers.decode_world import DecodeWorld
from tests.helpers.fake_runner import generate
from tests.helpers.prefill_world import PrefillWorld

A = list(range(100, 140))
B = list(range(200, 240))
LONG = SamplingParams(max_tokens=20, ignore_eos=True, seed=5)


def local(world: DecodeWorld, tokens: list[int], **options: object) -> int:
    return world.submit_local(world.request(tokens, **{"sampling": LONG, **options})).id


def ahead(world: DecodeWorld | PrefillWorld) -> tuple[list[int], list[Chunk]]:
    assert world.ahead is not None
    plan = world.ahead[0]
    return list(plan.decode), list(plan.chunks)


def stopping_at(tokens: list[int], count: int) -> SamplingParams:
    """A stop token ends it after `count` tokens at the latest."""
    return SamplingParams(
        max_tokens=20, ignore_eos=True, seed=5, stop_token_ids=(generate(tokens, LONG, 0, count)[-1],)
    )


def test_a_prompt_decodes_right_behind_its_last_chunk() -> None:
    world = DecodeWorld(overlap=True)
    request_id = local(world, A[:7])
    assert world.step().chunks == [Chunk(0, 0, 7, (0,))]
    assert ahead(world) == ([0], [])
    assert len(world.answers[request_id, 0]) == 1, "its first token waits for nobody"


@pytest.mark.parametrize("max_tokens", [1, 2, 5])
def test_no_row_is_wasted_on_an_end_that_is_known(max_tokens: int) -> None:
    world = DecodeWorld(overlap=True)
    request_id = local(world, A[:7], sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True))
    world.run_to_end()
    assert world.reasons[request_id, 0] is FinishReason.LENGTH
    assert sum(plan.num_tokens for plan in world.runner.plans) == 7 + max_tokens - 1
    world.check_empty()


def test_nobody_runs_past_the_context() -> None:
    world = DecodeWorld(num_blocks=3, max_model_len=12, overlap=True)
    request_id = local(world, A[:9])
    world.run_to_end()
    assert (len(world.answers[request_id, 0]), world.reasons[request_id, 0]) == (3, FinishReason.LENGTH)


def test_a_row_behind_an_end_is_dropped_and_keeps_its_blocks_until_it_is_over() -> None:
    world = DecodeWorld(overlap=True)
    request_id = local(world, A[:7], sampling=stopping_at(A[:7], 1))
    world.step()
    assert world.reasons[request_id, 0] is FinishReason.STOP
    assert ahead(world) == ([0], [])
    assert str(world.pool.ledger()) == "free=14 active=2"
    world.step()
    assert len(world.answers[request_id, 0]) == 1
    assert str(world.pool.ledger()) == "free=15 cached=1"
    world.settle()
    world.check_empty()


def test_what_is_cancelled_in_flight_comes_free_when_the_step_behind_is_over() -> None:
    world = DecodeWorld(overlap=True)
    request_id = local(world, A[:7])
    world.step()
    world.cancel(request_id)
    assert str(world.pool.ledger()) == "free=14 active=2"
    world.step()
    assert str(world.pool.ledger()) == "free=15 cached=1"
    world.settle()
    world.check_empty()


def test_a_slot_that_ended_is_taken_by_the_plan_after_next() -> None:
    world = DecodeWorld(overlap=True, max_num_seqs=1)
    local(world, A[:7], sampling=stopping_at(A[:7], 1))
    second = local(world, B[:5])
    world.step()
    assert ahead(world) == ([0], []), "the row of the first, launched before its end was known"
    world.step()
    assert ahead(world) == ([], [Chunk(0, 0, 5, (0,))])
    world.run_to_end()
    world.check_answers()
    assert len(world.answers[second, 0]) == 20


def test_a_block_is_taken_for_a_token_that_is_not_known_yet() -> None:
    world = DecodeWorld(overlap=True)
    local(world, A[:4])
    world.step()
    assert world.ahead is not None
    assert world.ahead[0].appended == [BlockAppend(0, 1, [1])]


def test_a_step_before_which_somebody_must_give_way_waits_for_the_one_in_flight() -> None:
    world = DecodeWorld(num_blocks=4, budget=64, max_model_len=16, overlap=True)
    local(world, A[:7])
    local(world, B[:7])
    world.step()
    assert ahead(world) == ([0, 1], [])
    world.step()
    assert world.ahead is None
    assert world.scheduler.num_preempted == 0
    world.step()
    assert world.scheduler.num_preempted == 1
    world.run_to_end()
    world.check_answers()
    world.check_empty()


def test_choices_fork_when_their_first_tokens_are_known() -> None:
    world = DecodeWorld(overlap=True)
    request_id = local(world, A[:6], choices=(0, 1))
    assert world.step().chunks == [Chunk(0, 0, 6, (0, 1))]
    assert world.ahead is None, "nothing could be planned behind it"
    assert world.step().decode == [0, 1]
    world.run_to_end()
    world.check_answers()
    assert len(world.answers[request_id, 1]) == 20


def test_a_copy_in_flight_keeps_its_target() -> None:
    world = DecodeWorld(overlap=True, max_num_seqs=1)
    request_id = local(world, A[:6], choices=(0, 1))
    world.step()
    world.step()
    assert any(plan.copies for plan in world.runner.plans)
    world.cancel_choices(request_id, (1,))
    world.check()
    world.run_to_end()
    world.check_answers()
    world.check_empty()


def test_a_prompt_whose_next_block_is_being_computed_waits_to_find_it() -> None:
    world = DecodeWorld(overlap=True, budget=8)
    local(world, A[:8])
    local(world, A[:8])
    world.step()
    assert ahead(world) == ([0], [])
    world.step()
    assert ahead(world) == ([0], [Chunk(1, 4, 8, (0,))])
    world.run_to_end()
    world.check_answers()


# -- prefill ----------------------------------------------------------------------------------------------------------


def test_the_next_chunk_is_planned_behind_the_last_and_blocks_are_ready_one_step_at_a_time() -> None:
    world = PrefillWorld(overlap=True, budget=4)
    request = world.submit(A[:12])
    for num_ready in (1, 2):
        world.step()
        job = world.scheduler.job(request.id)
        assert job is not None
        assert (job.num_ready, job.num_computed, job.num_planned) == (num_ready, 4 * num_ready, 4 * num_ready + 4)
    world.run_to_end()
    world.check_answers()
    world.check_empty()


def test_a_prompt_dropped_in_flight_keeps_its_blocks_until_the_step_is_over() -> None:
    world = PrefillWorld(overlap=True, budget=4)
    request = world.submit(A[:12])
    world.step()
    world.drop(request.id)
    assert str(world.pool.ledger()) == "free=13 active=3"
    world.step()
    assert str(world.pool.ledger()) == "free=15 cached=1"
    world.settle()
    world.check_empty()


def test_a_prompt_with_the_same_beginning_waits_to_find_it() -> None:
    world = PrefillWorld(overlap=True, budget=8)
    world.submit(A[:8])
    second = world.submit(A[:8])
    world.step()
    assert world.ahead is None
    world.step()
    job = world.scheduler.job(second.id)
    assert job is not None
    assert job.num_cached_tokens == 4

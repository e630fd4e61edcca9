"""The prefill schedule, with exact plans and block ids. Blocks of 4 tokens."""

import pytest

from tailrace.kv.block_pool import BlockState
from tailrace.plan import Chunk
from tailrace.types import FinishReason, SamplingParams
from tests.helpers.decode_world import expected
from tests.helpers.prefill_world import PrefillWorld

A = list(range(100, 140))
B = list(range(200, 240))


def test_a_prompt_takes_all_its_blocks_and_is_computed_in_chunks_under_the_budget() -> None:
    world = PrefillWorld(budget=5)
    world.submit(A[:12])
    plan = world.step()
    assert (plan.started[0].slot, list(plan.started[0].blocks)) == (0, [0, 1, 2])
    assert plan.chunks == [Chunk(0, 0, 5)]
    assert world.step().chunks == [Chunk(0, 5, 10)]
    assert world.step().chunks == [Chunk(0, 10, 12, (0,))]
    assert world.step().released == [0]


def test_blocks_become_ready_as_they_are_written_and_the_partial_one_at_the_end() -> None:
    world = PrefillWorld(budget=5)
    world.submit(A[:10])
    ready = []
    for _ in range(2):
        world.step()
        job = world.scheduler.job(1)
        assert job is not None
        ready.append((job.num_ready, job.is_computed))
    assert ready == [(1, False), (3, True)]


def test_the_budget_is_shared_in_order_of_arrival() -> None:
    world = PrefillWorld(budget=10)
    for tokens in (A[:6], B[:6], A[20:26]):
        world.submit(tokens)
    assert world.step().chunks == [Chunk(0, 0, 6, (0,)), Chunk(1, 0, 4)]
    assert world.step().chunks == [Chunk(1, 4, 6, (0,)), Chunk(0, 0, 6, (0,))]


def test_priority_goes_before_arrival_but_never_interrupts() -> None:
    world = PrefillWorld(budget=4, max_num_seqs=1)
    world.submit(A[:6], priority=0)
    world.step()
    world.submit(B[:4], priority=1)
    world.submit(A[20:24], priority=-1)
    assert world.step().chunks == [Chunk(0, 4, 6, (0,))]
    orders = [world.step().started[0].tokens for _ in range(2)]
    assert orders == [A[20:24], B[:4]]


def test_a_prefix_is_reused_and_at_least_one_token_computed() -> None:
    world = PrefillWorld()
    world.submit(A[:8])
    world.step()
    world.drop(1)
    world.submit(A[:8])
    plan = world.step()
    assert plan.started[0].blocks[0] == 0
    assert plan.chunks == [Chunk(0, 4, 8, (0,))]
    job = world.scheduler.job(2)
    assert job is not None
    assert job.num_cached_tokens == 4


def test_two_running_prompts_share_the_blocks_of_their_prefix() -> None:
    world = PrefillWorld()
    world.submit(A[:12])
    world.step()
    world.submit([*A[:8], *B[:4]])
    plan = world.step()
    assert list(plan.started[0].blocks) == [0, 1, 3]
    assert plan.chunks == [Chunk(0, 8, 12, (0,))]
    world.drop(1)
    assert [world.pool.state(block) for block in (0, 1, 2)] == [BlockState.LENT, BlockState.LENT, BlockState.CACHED]


def test_a_prompt_that_does_not_fit_is_not_overtaken() -> None:
    world = PrefillWorld(num_blocks=6, budget=4)
    world.submit(A[:16])
    world.step()
    world.submit(B[:16])
    world.submit(A[20:24])
    for _ in range(3):
        assert not world.step().started
    world.drop(1)
    assert [start.tokens for start in world.step().started] == [B[:16]]


def test_nothing_is_admitted_while_finished_prompts_hold_more_than_half_the_pool() -> None:
    world = PrefillWorld(num_blocks=10, budget=64)
    world.submit(A[:12])
    world.submit(B[:12])
    world.step()
    world.submit(A[20:24])
    assert not world.step().started
    world.drop(1)
    assert len(world.step().started) == 1


def test_exactly_half_held_still_admits() -> None:
    world = PrefillWorld(num_blocks=6, budget=64)
    world.submit(A[:12])
    world.step()
    world.submit(B[:4])
    assert len(world.step().started) == 1


def test_blocks_are_lent_when_the_prompt_is_computed() -> None:
    world = PrefillWorld(budget=4)
    world.submit(A[:8])
    world.step()
    assert str(world.pool.ledger()) == "free=14 active=2"
    world.step()
    assert str(world.pool.ledger()) == "free=14 lent=2"
    world.drop(1)
    assert str(world.pool.ledger()) == "free=14 cached=2"


@pytest.mark.parametrize(("steps", "left"), [(0, "free=16"), (1, "free=15 cached=1"), (3, "free=14 cached=2")])
def test_dropped_while_waiting_running_or_held_everything_comes_back(steps: int, left: str) -> None:
    world = PrefillWorld(budget=4)
    world.submit(A[:10])
    for _ in range(steps):
        world.step()
    world.drop(1)
    world.drop(1)
    assert str(world.pool.ledger()) == left
    world.step()
    world.check_empty()


def test_a_dropped_waiter_in_the_middle_of_the_line_is_skipped() -> None:
    world = PrefillWorld(budget=64, max_num_seqs=1)
    for tokens in (A[:4], B[:4], A[20:24]):
        world.submit(tokens)
    world.drop(2)
    assert (world.scheduler.num_waiting, world.scheduler.waiting_tokens) == (2, 8)
    assert [start.tokens for start in world.step().started] == [A[:4]]
    assert [start.tokens for start in world.step().started] == [A[20:24]]


def test_every_choice_is_drawn_from_the_last_chunk() -> None:
    world = PrefillWorld(budget=4)
    request = world.submit(A[:6], choices=(0, 1, 2))
    assert world.step().chunks[0].choices == ()
    assert world.step().chunks[0].choices == (0, 1, 2)
    drawn = world.done[1]
    assert [token.choice for token in drawn] == [0, 1, 2]
    assert [token.token_id for token in drawn] == [expected(request, choice, 64)[0][0] for choice in range(3)]
    assert len({token.token_id for token in drawn}) > 1


def test_rows_of_two_prompts_that_end_together_are_told_apart() -> None:
    world = PrefillWorld(budget=64)
    world.submit(A[:6], choices=(0, 1, 2))
    world.submit(B[:6], choices=(0, 1))
    world.step()
    world.check_answers_so_far()


def test_a_released_slot_is_in_the_next_plan_and_may_be_taken_in_it() -> None:
    world = PrefillWorld(budget=8, max_num_seqs=1)
    world.submit(A[:4])
    world.submit(B[:4])
    world.step()
    plan = world.step()
    assert (plan.released, [start.slot for start in plan.started]) == ([0], [0])


def test_a_first_token_that_ends_its_choice_says_so() -> None:
    world = PrefillWorld()
    world.submit(A[:4], sampling=SamplingParams(max_tokens=1))
    world.submit(A[:4], sampling=SamplingParams(max_tokens=2, ignore_eos=True), num_prompt_tokens=3)
    world.submit(A[:4], sampling=SamplingParams(max_tokens=9, ignore_eos=True))
    world.step()
    reasons = {request_id: tokens[0].finish_reason for request_id, tokens in world.done.items()}
    assert reasons == {1: FinishReason.LENGTH, 2: FinishReason.LENGTH, 3: None}


def test_fits_is_the_whole_pool() -> None:
    world = PrefillWorld(num_blocks=4)
    assert world.scheduler.fits(16)
    assert not world.scheduler.fits(17)


def test_with_a_window_a_late_read_does_not_keep_a_long_prompt_waiting() -> None:
    world = PrefillWorld(num_blocks=8, block_size=4, window=10, budget=16, max_model_len=500)
    world.pool.quarantine(world.pool.allocate_landing(1) or [])
    world.submit([7] * 300)
    world.submit([9] * 5)
    for _ in range(100):
        world.step()
    assert len(world.done) == 2

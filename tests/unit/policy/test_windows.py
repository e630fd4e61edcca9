"""What sequences hold, book, hand over and find where every layer attends to the same window."""

import pytest

from tailrace.policy.request import Request
from tailrace.types import SamplingParams
from tests.helpers.decode_world import DecodeWorld
from tests.helpers.prefill_world import PrefillWorld

WINDOW = 10
A = [100 + at for at in range(60)]
B = [200 + at for at in range(60)]
"""With blocks of 4, a token sees 4 blocks at most."""


def decode_world(**options: object) -> DecodeWorld:
    return DecodeWorld(**{"num_blocks": 7, "budget": 4, "window": WINDOW, "max_model_len": 500, **options})  # type: ignore[arg-type]


def prefill_world(**options: object) -> PrefillWorld:
    return PrefillWorld(**{"num_blocks": 8, "budget": 4, "window": WINDOW, "max_model_len": 500, **options})  # type: ignore[arg-type]


def ask(world: DecodeWorld, tokens: list[int], count: int, **options: object) -> Request:
    return world.request(tokens, sampling=SamplingParams(max_tokens=count, ignore_eos=True, seed=1), **options)


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_an_answer_of_many_pools_runs_in_a_small_one(overlap: bool, caching: bool) -> None:
    world = decode_world(overlap=overlap, prefix_caching=caching)
    request = world.submit_local(ask(world, A[:30], 300))
    most = 0
    while not world.reasons:
        world.step()
        world.check()
        most = max(most, world.pool.ledger().active)
    world.settle()
    world.check_answers()
    world.check_empty()
    assert len(world.answers[request.id, 0]) == 300
    assert world.scheduler.num_preempted == 0
    assert most == 5


def test_what_is_let_go_of_stays_findable() -> None:
    world = decode_world(num_blocks=40)
    request = world.submit_local(ask(world, A[:30], 50))
    while len(world.answers[request.id, 0]) < 49:
        world.step()
    assert len(world.pool.find_prefix(request.hashes)) == 7
    assert world.pool.ledger().cached > 10


def test_a_prompt_books_its_window_and_one_block_more() -> None:
    world = decode_world(num_blocks=8)
    request = ask(world, A[:50], 4)
    assert world.book(request)
    # The prompt's last token sees tokens 40 to 49.
    assert world.scheduler.booked_blocks == 3
    assert world.book(ask(world, B[:50], 4))
    assert not world.book(ask(world, A[:5], 4))
    world.want(request.id)
    world.step()
    pull = world.pulls[request.id]
    assert (len(pull.table), pull.num_local) == (13, 10)
    assert str(world.pool.ledger()) == "free=5 landing=3"
    world.start_read(request.id, 13)
    assert [at for flight in pull.flights for _, at in flight.blocks] == [10, 11, 12]
    world.run_to_end()
    world.check_answers()
    world.check_empty()


def test_a_cached_window_is_not_pulled_again_whatever_became_of_its_head() -> None:
    world = decode_world(num_blocks=8)
    first = ask(world, A[:48], 1)
    world.book(first)
    world.run_to_end()
    # Nobody ever had its head here.
    assert world.pool.find_prefix(first.hashes) == []
    again = ask(world, A[:50], 4)
    world.book(again)
    world.want(again.id)
    world.step()
    assert world.pulls[again.id].num_local == 12
    world.run_to_end()
    world.check_answers()
    world.check_empty()


def test_whoever_fits_only_by_its_window_is_accepted() -> None:
    world = decode_world(num_blocks=7)
    assert world.scheduler.fits(400)
    assert not decode_world(num_blocks=4).scheduler.fits(400)
    assert not decode_world(num_blocks=99, window=0).scheduler.fits(400)
    assert prefill_world().scheduler.fits(400)
    assert not prefill_world(window=0).scheduler.fits(400)


@pytest.mark.parametrize("overlap", [False, True])
def test_choices_share_what_is_in_the_window(overlap: bool) -> None:
    world = decode_world(num_blocks=12, overlap=overlap)
    world.submit_local(ask(world, A[:33], 40, choices=(0, 1, 2)))
    world.run_to_end()
    world.check_answers()
    world.check_empty()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_prompt_of_many_pools_is_computed_in_a_small_one(overlap: bool) -> None:
    world = prefill_world(overlap=overlap)
    request = world.submit([at % 19 for at in range(300)])
    most = 0
    while not world.done:
        world.step()
        world.pool.check_integrity()
        most = max(most, world.pool.ledger().active)
    assert 5 <= most <= 6
    [job] = world.scheduler.jobs()
    # The last token sees 290 to 299: blocks 72 to 74 are kept for who pulls them.
    assert (job.num_gone, str(world.pool.ledger())) == (72, "cached=5 lent=3")
    world.drop(request.id)
    world.settle()
    world.check_empty()
    world.check_answers()


def test_a_hit_takes_only_the_blocks_of_its_window() -> None:
    world = prefill_world(num_blocks=20, budget=40)
    first = world.submit(A[:40])
    world.step()
    world.drop(first.id)
    second = world.submit([*A[:40], 7, 7])
    plan = world.step()
    [chunk] = plan.chunks
    assert (chunk.start, chunk.end) == (40, 42)
    job = world.scheduler.job(second.id)
    assert job is not None
    assert (job.num_cached_tokens, job.num_gone, len(job.held)) == (40, 8, 3)
    assert str(world.pool.ledger()) == "free=9 cached=8 lent=3"


def test_a_hit_whose_head_was_evicted_is_one() -> None:
    world = prefill_world(num_blocks=12, budget=48)
    first = world.submit(A[:41])
    world.step()
    world.drop(first.id)
    evicting = world.pool.allocate(9)
    assert evicting is not None
    assert world.pool.find_prefix(first.hashes) == []
    world.pool.release(evicting)
    second = world.submit(A[:41])
    world.step()
    job = world.scheduler.job(second.id)
    assert job is not None
    assert job.num_cached_tokens == 40
    world.drop(second.id)
    world.check_answers()


def test_where_an_answer_went_on_from_what_it_found_is_offered_too() -> None:
    world = decode_world(num_blocks=40, budget=64)
    world.submit_local(ask(world, A[:41], 1))
    world.run_to_end()
    again = world.submit_local(ask(world, A, 1))
    world.offered.clear()
    world.run_to_end()
    assert world.offered == [again.hashes[7:10], again.hashes[11:15]]


def test_a_fetch_brings_only_what_is_in_the_window() -> None:
    world = prefill_world(num_blocks=20, budget=48)
    request = world.submit(A[:41], [range(0, 10)])
    world.step()
    assert [place for _, place in world.reads[request.id]] == [7, 8, 9]
    world.land(request.id)
    world.end_fetch(request.id)
    plan = world.step()
    assert [(chunk.start, chunk.end) for chunk in plan.chunks] == [(40, 41)]
    job = world.scheduler.job(request.id)
    assert job is not None
    assert (job.num_cached_tokens, job.num_found) == (40, 0)
    world.drop(request.id)
    world.check_answers()
    world.settle()
    world.check_empty()


def test_a_fetch_that_breaks_off_begins_again_from_what_is_here() -> None:
    """Of the blocks that came, none can be gone on from; the prompt waits in line again and is computed."""
    world = prefill_world(num_blocks=20, budget=48)
    request = world.submit(A[:41], [range(0, 10)])
    world.step()
    world.land(request.id, 2)
    world.end_fetch(request.id)
    plan = world.step()
    assert [(chunk.start, chunk.end) for chunk in plan.chunks] == [(0, 41)]
    world.drop(request.id)
    world.check_answers()
    world.settle()
    world.check_empty()

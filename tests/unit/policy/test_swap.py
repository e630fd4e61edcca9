"""Sequences that gave way and come back by way of the store: when, into which blocks, and what may go wrong meanwhile.

Blocks of 4 tokens.
"""

from collections.abc import Callable

import pytest

from tailrace.kv.block_pool import BlockPool
from tailrace.kv.window import LeadingBlocks, Window
from tailrace.plan import Chunk
from tailrace.policy.prompt_tables import PromptTables
from tailrace.policy.sequence import Sequence
from tailrace.policy.swap import MAX_SKIPPED, OVERHEAD_S, SwapCost, SwapIns
from tailrace.types import SamplingParams
from tests.helpers.decode_world import DecodeWorld, FakeSwap, make_request

A = list(range(100, 140))
B = list(range(200, 240))


def sampling(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=5)


def make_swap(*, num_blocks: int = 5, answer: int = 13) -> tuple[DecodeWorld, FakeSwap]:
    """The first sequence fills the pool and ends; the second gave way, lost its blocks, and fetches them back."""
    world = DecodeWorld(num_blocks=num_blocks, budget=64)
    world.submit_local(world.request(A[:8], sampling=sampling(answer)))
    world.submit_local(world.request(B[:8], sampling=sampling(8)))
    step_until(world, lambda: world.offered)
    assert world.scheduler.num_preempted == 1
    world.store_takes()
    step_until(world, lambda: world.swaps)
    return world, world.swaps[1]


def step_until(world: DecodeWorld, condition: Callable[[], object]) -> None:
    for _ in range(200):
        if condition():
            return
        world.step()
    raise AssertionError("it does not come to that")


# -- what it costs ----------------------------------------------------------------------------------------------------


def make_cost() -> SwapCost:
    return SwapCost(block_bytes=1000, block_tokens=10)


def taking(tokens_per_s: float, curve_s: float = 0.0) -> Callable[[int, int], float]:
    return lambda first, end: (end - first) / tokens_per_s + curve_s * (end * end - first * first)


def test_where_no_rate_is_known_fetching_finds_out() -> None:
    cost = make_cost()
    assert cost.is_cheaper(1)
    cost.note(10, 0.1)
    assert cost.fetch_bytes_per_s == 100_000
    assert cost.is_cheaper(1), "computing is not measured yet"


@pytest.mark.parametrize(
    ("tokens_per_s", "is_cheaper"), [(500.0, True), (940.0, True), (960.0, False), (5000.0, False)]
)
def test_fetching_must_be_cheaper_than_computing(tokens_per_s: float, is_cheaper: bool) -> None:
    """Ten blocks: 0.1 s and the overhead, against 100 tokens."""
    cost = make_cost()
    cost.note(10, 0.1)
    cost.prefill_s = taking(tokens_per_s)
    assert OVERHEAD_S == 0.005
    assert cost.is_cheaper(10) == is_cheaper


def test_a_rate_follows_what_is_measured() -> None:
    cost = make_cost()
    cost.note(10, 0.1)
    cost.note(10, 1.0)
    assert cost.fetch_bytes_per_s == pytest.approx(0.8 * 100_000 + 0.2 * 10_000)


def test_a_store_that_brings_nothing_is_asked_ever_more_rarely_and_no_more_rarely_than_that() -> None:
    cost = make_cost()
    skipped: list[int] = []
    for _ in range(10):
        cost.note(0, 1.0)
        skipped.append(next(count for count in range(1000) if cost.is_cheaper(1)))
    assert skipped == [1, 2, 4, 8, 16, 32, 64, 64, 64, 64]
    assert max(skipped) == MAX_SKIPPED
    cost.note(3, 0.1)
    assert cost.is_cheaper(1)
    cost.note(0, 1.0)
    assert [cost.is_cheaper(1) for _ in range(2)] == [False, True]


def test_what_was_measured_long_ago_is_measured_again() -> None:
    cost = make_cost()
    cost.note(10, 100.0)
    cost.prefill_s = taking(1000.0)
    assert next(count for count in range(1000) if cost.is_cheaper(10)) == MAX_SKIPPED
    assert next(count for count in range(1000) if cost.is_cheaper(10)) == MAX_SKIPPED, "one only is let through"


def test_with_a_window_only_what_is_read_is_weighed_against_computing_it_all() -> None:
    cost = make_cost()
    cost.note(10, 0.1)
    cost.prefill_s = taking(1000.0)
    assert [cost.is_cheaper(10, num_read=read) for read in (10, 9, 1)] == [False, True, True]


def test_what_attention_adds_counts_behind_what_is_found() -> None:
    cost = make_cost()
    cost.note(10, 0.1)
    cost.prefill_s = taking(2000.0, curve_s=1e-6)
    assert [cost.is_cheaper(10, num_found=found) for found in (0, 100)] == [False, True]


# -- the way back -----------------------------------------------------------------------------------------------------


def test_what_was_lost_is_read_into_blocks_of_its_own_and_only_the_rest_is_computed() -> None:
    world, swap = make_swap()
    assert (swap.num_local, len(swap.table)) == (0, 2)
    tokens = len(world.requests[2].tokens) + len(world.answers[2, 0])
    assert world.pool.ledger().landing == 2
    assert (world.scheduler.num_waiting, world.scheduler.waiting_tokens) == (1, tokens - 8)
    assert world.step().is_empty, "nobody else is there"
    world.read_swap(swap, 2)
    world.land_swap(swap)
    assert world.step().is_empty, "the fetch has not ended"
    world.end_swap(swap)
    plan = world.step()
    assert plan.chunks == [Chunk(plan.started[0].slot, 8, tokens, (0,))]
    assert list(plan.started[0].blocks[:2]) == swap.table
    world.run_to_end()
    world.check_answers()
    world.check_empty()


def test_what_is_still_cached_here_is_not_fetched() -> None:
    world, swap = make_swap(num_blocks=6)
    assert (swap.num_local, len(swap.table)) == (1, 3)
    assert world.pool.find_prefix(swap.hashes) == swap.table[:1]
    world.run_to_end()
    assert world.num_swapped_in == 1, "its last one was evicted before it could be offered"
    world.check_answers()
    world.check_empty()


def test_what_does_not_come_is_computed() -> None:
    world, swap = make_swap()
    world.read_swap(swap, 1)
    world.land_swap(swap)
    world.end_swap(swap)
    assert world.step().chunks[0].start == 4
    world.run_to_end()
    world.check_answers()
    world.check_empty()


def test_a_late_read_keeps_its_blocks_and_nothing_else() -> None:
    world, swap = make_swap()
    world.read_swap(swap, 2)
    world.end_swap(swap)
    assert world.pool.ledger().quarantined == 2
    plan = world.step()
    assert not set(plan.started[0].blocks) & set(swap.table), "it gets others, and computes"
    assert plan.chunks[0].start == 0
    assert world.swaps == {}, "it does not fetch again"
    world.land_swap(swap)
    assert world.pool.ledger().quarantined == 0
    world.run_to_end()
    world.check_answers()
    world.check_empty()


@pytest.mark.parametrize("num_landed", [0, 1, 2])
def test_a_cancelled_one_is_forgotten_at_once_and_its_blocks_when_its_fetch_has_ended(num_landed: int) -> None:
    world, swap = make_swap()
    for _ in range(2):
        world.read_swap(swap, 1)
    for _ in range(num_landed):
        world.land_swap(swap)
    world.cancel(2)
    assert world.scheduler.num_waiting == 0
    assert world.pool.ledger().landing == 2 - num_landed
    world.check()
    while swap.flights:
        world.land_swap(swap)
    world.end_swap(swap)
    world.check_empty()


def test_one_that_is_cancelled_between_its_fetch_and_its_first_chunk_leaves_nothing() -> None:
    world, swap = make_swap()
    world.read_swap(swap, 2)
    world.land_swap(swap)
    world.end_swap(swap)
    world.cancel(2)
    world.check_empty()
    assert world.pool.find_prefix(swap.hashes) == swap.table, "what has landed can be found"


def test_without_a_cost_nothing_is_fetched() -> None:
    world = DecodeWorld(num_blocks=6, budget=64, swaps=False)
    world.submit_local(world.request(A[:8], sampling=sampling(17)))
    world.submit_local(world.request(B[:8], sampling=sampling(8)))
    world.run_to_end()
    assert world.scheduler.num_preempted > 0
    assert world.late_swaps == []
    world.check_answers()


# -- nobody waits for ever --------------------------------------------------------------------------------------------


def waiting(tokens: list[int], request_id: int) -> Sequence:
    request = make_request(request_id, tokens, block_size=4)
    return Sequence(request, (0,), list(tokens), list(request.hashes), num_offered=len(request.hashes))


def test_what_is_found_here_leaves_as_much_to_be_fetched_as_before() -> None:
    pool = BlockPool(80, epoch=1)
    swaps = SwapIns(PromptTables(pool, Window(0, 4), 16), make_cost())
    sequence = waiting(list(range(160)), 1)
    assert [swaps.reach(sequence, found, 39) for found in (0, 5, 30)] == [20, 25, 39]


def test_nothing_is_fetched_while_too_much_of_the_pool_waits_for_reads_that_are_late() -> None:
    pool = BlockPool(16, epoch=1)
    swaps = SwapIns(PromptTables(pool, Window(0, 4), 16), make_cost())
    late = pool.allocate_landing(5)
    assert late is not None
    assert swaps.reach(waiting(A[:9], 1), 0, 2) == 2
    pool.quarantine(late)
    assert swaps.reach(waiting(A[:9], 1), 0, 2) == 0
    pool.abandon_landing(late[:1])
    assert swaps.reach(waiting(A[:9], 1), 0, 2) == 2


@pytest.mark.parametrize("first", [0, 1])
def test_two_that_fetch_do_not_wait_for_each_other(first: int) -> None:
    """Each holds all that it needs before its first read, so each can end whether or not the other does."""
    pool = BlockPool(12, epoch=1)
    swaps = SwapIns(PromptTables(pool, Window(0, 4), 16), make_cost())
    sequences = [waiting(A[:9], 1), waiting(B[:9], 2)]
    for sequence in sequences:
        assert swaps.reach(sequence, 0, 2) == 2
        assert swaps.claim(sequence, LeadingBlocks(), 2, spare=6)
    assert str(pool.ledger()) == "free=6 active=2 landing=4"
    fetches = swaps.drain_granted()
    for fetch in (fetches[first], fetches[1 - first]):
        swaps.landed(fetch.request.id, fetch.blocks[:2])
        assert swaps.end(fetch.request.id, ()) is None
        fetched = swaps.take_ended()
        assert fetched is not None
        assert fetched.sequence is sequences[fetch.request.id - 1]
        assert (fetched.table.blocks, fetched.num_ready) == (fetch.blocks, 2)
    assert str(pool.ledger()) == "free=6 active=6"


def test_no_more_than_half_of_the_pool_waits_for_reads_unless_it_is_for_one_alone() -> None:
    pool = BlockPool(12, epoch=1)
    swaps = SwapIns(PromptTables(pool, Window(0, 4), 16), make_cost())
    assert swaps.claim(waiting(A[:29], 1), LeadingBlocks(), 7, spare=0), "eight blocks for one alone"
    assert not swaps.claim(waiting(B[:5], 2), LeadingBlocks(), 1, spare=0)
    [fetch] = swaps.drain_granted()
    swaps.landed(fetch.request.id, fetch.blocks[:7])
    swaps.end(fetch.request.id, ())
    assert swaps.take_ended() is not None
    assert not swaps.claim(waiting(B[:5], 2), LeadingBlocks(), 1, spare=3), "those that run keep a block each"
    assert swaps.claim(waiting(B[:5], 2), LeadingBlocks(), 1, spare=2)


def test_whoever_runs_goes_on_beside_one_that_fetches_and_may_outgrow_the_pool() -> None:
    """A fetch gives way to nobody; the one that runs gives way itself, and comes back when the fetch has ended."""
    world, swap = make_swap()
    runner = world.submit_local(world.request(A[20:24], sampling=sampling(17)))
    for _ in range(30):
        world.step()
    assert world.swaps == {1: swap}
    assert world.scheduler.num_preempted >= 2
    assert 0 < len(world.answers[runner.id, 0]) < 17
    world.check()
    world.run_to_end()
    world.check_answers()
    world.check_empty()


# -- prompts whose prefix others hold ---------------------------------------------------------------------------------


@pytest.mark.parametrize("is_store", [True, False])
def test_a_prompt_fetches_what_others_hold_and_computes_the_rest(is_store: bool) -> None:
    world = DecodeWorld(budget=64, swaps=is_store)
    world.submit_local(world.request(A[:4], sampling=sampling(1)))
    world.step()
    request = world.submit_local(world.request(A[:18], sampling=sampling(4)), [range(3)])
    assert world.step().is_empty
    [(_, fetch)] = world.scheduler.swaps.held()
    assert (fetch.blocks, fetch.num_local, fetch.end) == ([0, 1, 2, 3, 4], 1, 3)
    assert world.scheduler.swaps.prompt_of(1) == request.id
    swap = world.swaps[1]
    world.read_swap(swap, 3)
    world.land_swap(swap)
    world.end_swap(swap)
    assert world.scheduler.swaps.prompt_of(1) is None
    plan = world.step()
    assert (list(plan.started[0].blocks), plan.chunks) == ([0, 1, 2, 3, 4], [Chunk(0, 12, 18, (0,))])
    world.run_to_end()
    world.check_answers()
    world.check_empty()


def test_a_prompt_whose_fetch_is_late_keeps_its_place_and_fetches_no_more() -> None:
    world = DecodeWorld(budget=64)
    world.submit_local(world.request(A[:18], sampling=sampling(4)), [range(3)])
    world.submit_local(world.request(B[:4], sampling=sampling(4)))
    world.step()
    swap = world.swaps[1]
    world.read_swap(swap, 3)
    world.end_swap(swap)
    plan = world.step()
    assert [start.tokens for start in plan.started] == [A[:18]]
    assert world.swaps == {}
    world.run_to_end()
    world.check_answers()
    world.check_empty()


def test_a_prompt_waits_for_the_blocks_that_another_one_fetches() -> None:
    world = DecodeWorld(budget=64)
    world.submit_local(world.request(A[:18], sampling=sampling(4)), [range(3)])
    world.submit_local(world.request([*A[:12], 7], sampling=sampling(4)))
    assert world.step().is_empty
    assert world.step().is_empty
    swap = world.swaps[1]
    world.read_swap(swap, 3)
    world.land_swap(swap)
    world.end_swap(swap)
    assert [(chunk.start, chunk.end) for chunk in world.step().chunks] == [(12, 18), (12, 13)]
    world.run_to_end()
    world.check_answers()
    world.check_empty()


def test_a_prompt_that_finds_all_that_was_named_here_fetches_nothing() -> None:
    world = DecodeWorld(budget=64)
    world.submit_local(world.request(A[:18], sampling=sampling(1)))
    world.step()
    world.submit_local(world.request([*A[:16], 7], sampling=sampling(4)), [range(4)])
    assert world.step().chunks == [Chunk(0, 16, 17, (0,))]
    assert world.swaps == {}


def test_who_gives_way_after_its_prefix_came_asks_the_store_and_nobody_else() -> None:
    world = DecodeWorld(num_blocks=5, budget=64)
    world.submit_local(world.request(A[:8], sampling=sampling(13)))
    world.submit_local(world.request(B[:8], sampling=sampling(8)), [range(1)])
    step_until(world, lambda: world.swaps)
    assert world.scheduler.swaps.prompt_of(1) == 2
    world._finish_swaps()
    step_until(world, lambda: world.offered)
    assert world.scheduler.num_preempted == 1
    world.store_takes()
    step_until(world, lambda: world.swaps)
    assert world.scheduler.swaps.prompt_of(2) is None
    world.run_to_end()
    world.check_answers()
    world.check_empty()


def test_with_a_window_the_end_of_a_long_prefix_is_read_and_counts_as_what_it_is() -> None:
    world = DecodeWorld(num_blocks=40, block_size=4, window=10, budget=16, max_model_len=500)
    world.submit_local(world.request([number % 97 for number in range(241)], sampling=sampling(4)), [range(60)])
    while not world.swaps:
        world.step()
    [fetch] = world.swaps.values()
    assert (fetch.num_local, len(fetch.table)) == (57, 60)
    world.run_to_end()
    world.check_answers()
    world.check_empty()

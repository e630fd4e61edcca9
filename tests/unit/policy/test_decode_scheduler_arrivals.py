"""Booked requests: promised, granted, landed, joined, forked; with exact block ids. Blocks of 4 tokens."""

from tailrace.kv.block_pool import BlockState
from tailrace.plan import BlockCopy
from tailrace.types import SamplingParams
from tests.helpers.decode_world import DecodeWorld

A = list(range(100, 140))
B = list(range(200, 240))
LONG = SamplingParams(max_tokens=20, ignore_eos=True, seed=5)


def book(world: DecodeWorld, tokens: list[int], **options: object) -> int:
    request = world.request(tokens, **{"sampling": LONG, **options})
    assert world.book(request)
    return request.id


def grant(world: DecodeWorld, *request_ids: int) -> list[int]:
    """Everybody asks; whoever has a table now."""
    for request_id in request_ids:
        world.want(request_id)
    world.step()
    return [request_id for request_id in request_ids if world.pulls[request_id].table]


def pull(world: DecodeWorld, request_id: int) -> None:
    """All the way to joined."""
    assert grant(world, request_id) == [request_id]
    world.start_read(request_id, 99)
    while world.pulls[request_id].flights:
        world.land(world.pulls[request_id])
    assert world.join(request_id)


# -- booking ----------------------------------------------------------------------------------------------------------


def test_a_booking_is_for_the_prompt_and_a_block_more_and_takes_nothing() -> None:
    world = DecodeWorld(num_blocks=8)
    book(world, A[:12])
    assert (world.scheduler.booked_blocks, world.pool.num_available) == (3, 8)
    assert world.scheduler.num_waiting == 1
    book(world, B[:16])
    assert not world.book(world.request(A[20:24])), "3 + 4 are booked, a block and one more are not there"


def test_bookings_count_against_what_is_free_now() -> None:
    world = DecodeWorld(num_blocks=8)
    world.submit_local(world.request(A[:16], sampling=LONG))
    world.step()
    assert world.pool.num_available == 4
    assert not world.book(world.request(B[:16]))
    book(world, B[:12])


def test_an_idle_worker_books_whatever_it_can_ever_hold() -> None:
    world = DecodeWorld(num_blocks=4)
    assert world.scheduler.fits(15)
    assert not world.scheduler.fits(16)
    book(world, A[:15])


def test_a_granted_booking_counts_no_more() -> None:
    world = DecodeWorld(num_blocks=8)
    first = book(world, A[:12])
    grant(world, first)
    assert (world.scheduler.booked_blocks, world.pool.num_available) == (0, 5)


# -- grants -----------------------------------------------------------------------------------------------------------


def test_blocks_are_granted_only_when_the_owner_has_something_to_pull() -> None:
    world = DecodeWorld()
    first = book(world, A[:8])
    world.step()
    assert not world.pulls[first].table
    assert grant(world, first) == [first]
    assert world.pulls[first].table == [0, 1]
    assert str(world.pool.ledger()) == "free=14 landing=2"


def test_a_grant_is_all_or_nothing_and_the_head_of_the_line_waits_alone() -> None:
    world = DecodeWorld(num_blocks=8)
    local = world.submit_local(world.request(A[:4], sampling=LONG))
    world.step()
    big, small = book(world, B[:16]), book(world, A[20:24])
    world.scheduler._pool.allocate(3)
    assert grant(world, big, small) == [], "4 are free, one of them is kept for the running sequence"
    assert world.pool.ledger().landing == 0
    world.cancel(local.id)
    assert grant(world, big, small) == [big, small]


def test_grants_follow_rank_not_the_order_of_asking() -> None:
    world = DecodeWorld(num_blocks=8)
    low, high = book(world, A[:12], priority=1), book(world, B[:12], priority=0)
    grant(world, low, high)
    assert (world.pulls[high].table, world.pulls[low].table) == ([0, 1, 2], [3, 4, 5])


def test_a_preempted_older_request_is_not_overtaken_by_a_grant() -> None:
    world = DecodeWorld(num_blocks=8, budget=4, max_num_seqs=1)
    running = world.submit_local(world.request(B[:4], sampling=LONG))
    world.step()
    older = world.submit_local(world.request(A[:8], sampling=LONG))
    newer = book(world, A[20:24])
    assert grant(world, newer) == []
    world.cancel(older.id)
    assert grant(world, newer) == [newer]
    assert running.id in world.choices


def test_what_is_cached_here_is_not_pulled() -> None:
    world = DecodeWorld(budget=64)
    world.submit_local(world.request(A[:8], sampling=SamplingParams(max_tokens=1)))
    world.step()
    second = book(world, [*A[:8], *B[:6]])
    grant(world, second)
    assert (world.pulls[second].table, world.pulls[second].num_local) == ([0, 1, 2, 3], 2)
    assert str(world.pool.ledger()) == "free=12 active=2 landing=2"
    world.run_to_end()
    world.check_answers()


def test_a_prompt_cached_as_a_whole_joins_without_a_read() -> None:
    world = DecodeWorld(budget=64)
    world.submit_local(world.request(A[:8], sampling=SamplingParams(max_tokens=1)))
    world.step()
    second = book(world, A[:8])
    assert grant(world, second) == [second]
    assert (world.pulls[second].table, world.pulls[second].num_local) == ([0, 1], 2)
    world.start_read(second, 9)
    assert world.join(second)
    world.run_to_end()
    world.check_answers()


# -- landing and joining ----------------------------------------------------------------------------------------------


def test_landed_blocks_become_active_and_findable_only_at_the_join() -> None:
    world = DecodeWorld()
    first = book(world, A[:8])
    grant(world, first)
    world.start_read(first, 1)
    world.start_read(first, 1)
    world.land(world.pulls[first], 1)
    assert [world.pool.state(block) for block in (0, 1)] == [BlockState.LANDING, BlockState.ACTIVE]
    assert world.pool.cached_hashes() == []
    world.land(world.pulls[first], 0)
    assert world.join(first)
    assert world.pool.cached_hashes() == world.requests[first].hashes


def test_a_joined_sequence_decodes_from_the_first_token_on() -> None:
    world = DecodeWorld()
    first = book(world, A[:7])
    pull(world, first)
    plan = world.step()
    start = plan.started[0]
    assert (start.slot, len(start.tokens), list(start.blocks)) == (0, 8, [0, 1])
    assert (plan.decode, plan.chunks) == ([0], [])
    assert len(world.answers[first, 0]) == 2


def test_a_join_at_a_block_boundary_takes_the_block_that_its_first_token_needs() -> None:
    world = DecodeWorld()
    first = book(world, A[:8])
    pull(world, first)
    assert list(world.step().started[0].blocks) == [0, 1, 2]


def test_first_tokens_that_end_every_choice_need_no_step() -> None:
    world = DecodeWorld()
    first = book(world, A[:8], sampling=SamplingParams(max_tokens=1), choices=(0, 1))
    pull(world, first)
    assert not world.choices[first]
    assert not world.step().changes_anything
    assert str(world.pool.ledger()) == "free=14 cached=2"


def test_joining_waits_for_a_slot() -> None:
    world = DecodeWorld(max_num_seqs=1)
    first = book(world, A[:4], sampling=SamplingParams(max_tokens=3, ignore_eos=True))
    second = book(world, B[:4])
    grant(world, first, second)
    for request_id in (first, second):
        world.start_read(request_id, 9)
        world.land(world.pulls[request_id])
        world.join(request_id)
    assert (world.scheduler.num_waiting, world.scheduler.num_running) == (2, 0)
    world.step()
    assert (world.scheduler.num_waiting, world.scheduler.num_running) == (1, 1)
    assert len(world.answers[second, 0]) == 1
    world.run_to_end()
    world.check_answers()
    world.check_empty()


# -- forks ------------------------------------------------------------------------------------------------------------


def test_a_fork_shares_full_blocks_and_copies_the_partial_one() -> None:
    world = DecodeWorld()
    first = book(world, A[:10], choices=(0, 1, 2))
    pull(world, first)
    tables = [list(sequence.blocks) for sequence in world.scheduler.sequences()]
    assert tables == [[0, 1, 2], [0, 1, 3], [0, 1, 4]]
    assert [world.pool.num_references(block) for block in range(5)] == [3, 3, 3, 1, 1]
    plan = world.step()
    assert plan.copies == [BlockCopy(2, 3), BlockCopy(2, 4)]
    assert [world.pool.num_references(block) for block in range(5)] == [3, 3, 1, 1, 1]


def test_a_fork_at_a_block_boundary_copies_nothing() -> None:
    world = DecodeWorld()
    first = book(world, A[:8], choices=(0, 1))
    pull(world, first)
    plan = world.step()
    assert (plan.copies, [list(start.blocks) for start in plan.started]) == ([], [[0, 1, 2], [0, 1, 3]])


def test_the_source_of_a_copy_outlives_its_sequence() -> None:
    world = DecodeWorld()
    first = book(world, A[:10], choices=(0, 1))
    pull(world, first)
    world.cancel_choices(first, (0,))
    assert world.pool.state(2) is BlockState.ACTIVE
    assert world.step().copies == [BlockCopy(2, 3)]
    assert world.pool.state(2) is BlockState.FREE
    world.run_to_end()
    world.check_answers()


def test_a_copy_for_a_choice_that_is_cancelled_before_the_step_does_not_happen() -> None:
    world = DecodeWorld()
    first = book(world, A[:10], choices=(0, 1, 2))
    pull(world, first)
    world.cancel_choices(first, (1,))
    assert world.pool.state(3) is BlockState.FREE
    assert world.step().copies == [BlockCopy(2, 4)]
    assert world.pool.num_references(2) == 1


def test_a_fork_without_room_is_computed_again_later() -> None:
    world = DecodeWorld(num_blocks=4, max_model_len=14)
    request = world.request(A[:10], sampling=SamplingParams(max_tokens=3, ignore_eos=True), choices=(0, 1, 2))
    assert world.book(request)
    pull(world, request.id)
    assert [s.choices for s in world.scheduler.sequences()] == [(0,), (1,)]
    assert world.scheduler.num_waiting == 3, "two join, one waits"
    world.run_to_end()
    world.check_answers()
    world.check_empty()


def test_a_choice_dropped_before_the_join_is_not_forked_nor_told_again() -> None:
    world = DecodeWorld()
    first = book(world, A[:10], choices=(0, 1, 2))
    grant(world, first)
    world.cancel_choices(first, (0, 2))
    world.start_read(first, 9)
    world.land(world.pulls[first])
    world.join(first)
    assert [s.choices for s in world.scheduler.sequences()] == [(1,)]
    world.run_to_end()
    world.check_answers()


# -- pulls that end otherwise -----------------------------------------------------------------------------------------


def test_cancelled_with_reads_in_flight_their_blocks_stay_landing_until_they_settle() -> None:
    world = DecodeWorld()
    first = book(world, A[:12])
    grant(world, first)
    for _ in range(2):
        world.start_read(first, 1)
    world.land(world.pulls[first], 0)
    world.cancel(first)
    assert str(world.pool.ledger()) == "free=15 landing=1"
    assert world.pool.state(1) is BlockState.LANDING
    assert world.scheduler._pool.allocate(15) is not None
    world.land(world.ghosts[0])
    assert str(world.pool.ledger()) == "free=1 active=15"


def test_without_its_last_choice_an_arrival_still_waits_for_its_reads() -> None:
    world = DecodeWorld()
    first = book(world, A[:8])
    grant(world, first)
    world.start_read(first, 2)
    world.cancel_choices(first, (0,))
    assert str(world.pool.ledger()) == "free=14 landing=2"
    world.land(world.pulls[first])
    world.join(first)
    assert str(world.pool.ledger()) == "free=16"


def test_without_its_last_choice_a_failed_pull_is_not_computed_here() -> None:
    world = DecodeWorld()
    first = book(world, A[:8])
    grant(world, first)
    world.start_read(first, 1)
    world.cancel_choices(first, (0,))
    world.fail(first, stalled=True)
    assert str(world.pool.ledger()) == "free=15 quarantined=1"
    assert not world.step().changes_anything
    world.land(world.ghosts[0])
    world.check_empty()


def test_a_failed_pull_is_computed_here_beside_its_quarantined_blocks() -> None:
    world = DecodeWorld(budget=64)
    first = book(world, A[:12])
    grant(world, first)
    world.start_read(first, 1)
    world.start_read(first, 1)
    world.land(world.pulls[first], 1)
    world.fail(first, stalled=True)
    assert str(world.pool.ledger()) == "free=15 quarantined=1"
    plan = world.step()
    assert 0 not in plan.started[0].blocks
    assert (plan.chunks[0].start, plan.chunks[0].end) == (0, 12)
    world.land(world.ghosts[0])
    assert world.pool.state(0) is BlockState.FREE
    world.run_to_end()
    world.check_answers()
    world.check_empty()


def test_a_local_prefix_is_given_back_by_a_failed_pull() -> None:
    world = DecodeWorld(budget=64)
    world.submit_local(world.request(A[:8], sampling=SamplingParams(max_tokens=1)))
    world.step()
    second = book(world, [*A[:8], *B[:6]])
    grant(world, second)
    world.fail(second, stalled=False)
    assert str(world.pool.ledger()) == "free=14 cached=2"
    assert world.step().chunks[0].start == 8
    world.run_to_end()
    world.check_answers()

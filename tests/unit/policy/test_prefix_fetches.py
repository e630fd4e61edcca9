"""Prompts whose prefix is fetched, with exact plans and block ids. Blocks of 4 tokens."""

import pytest

from tailrace.kv.block_pool import BlockPool, BlockState
from tailrace.kv.events import KVEventKind
from tailrace.kv.window import LeadingBlocks, Window
from tailrace.plan import Chunk
from tailrace.policy.prefill_scheduler import LOOK_AHEAD
from tailrace.policy.prefix_fetches import PrefixFetches
from tailrace.policy.prompt_tables import PromptTables
from tests.helpers.decode_world import make_request
from tests.helpers.prefill_world import PrefillWorld

A = list(range(100, 140))
B = list(range(200, 240))


def fetching_world(**options: int) -> PrefillWorld:
    """Request 1 fetches blocks 0 to 2 of 18 tokens, into blocks of the same numbers."""
    world = PrefillWorld(**options)  # type: ignore[arg-type]
    world.submit(A[:18], elsewhere=[range(3)])
    assert world.step().is_empty
    return world


def states(world: PrefillWorld, blocks: range) -> list[str]:
    return [world.pool.state(block).name.lower() for block in blocks]


def test_blocks_are_found_read_or_computed_in_this_order() -> None:
    world = PrefillWorld()
    world.submit(A[:5])
    world.step()
    world.drop(1)
    world.submit(A[:18], elsewhere=[range(1, 3)])
    world.step()
    fetch = world.fetch(2)
    assert (fetch.blocks, fetch.num_local, fetch.end) == ([0, 1, 2, 3, 4], 1, 3)
    assert states(world, range(5)) == ["active", "landing", "landing", "active", "active"]
    assert (world.scheduler.num_waiting, world.scheduler.waiting_tokens) == (1, 6)


def test_nothing_is_computed_before_the_fetch_has_ended_and_then_the_rest_is() -> None:
    world = fetching_world()
    world.land(1)
    assert world.step().is_empty
    world.end_fetch(1)
    plan = world.step()
    assert list(plan.started[0].blocks) == [0, 1, 2, 3, 4]
    assert plan.chunks == [Chunk(0, 12, 18, (0,))]
    job = world.scheduler.job(1)
    assert job is not None
    assert job.num_cached_tokens == 12
    world.run_to_end()
    world.check_answers()
    world.check_empty()


def test_what_has_landed_can_be_found_at_once_and_is_published_in_order() -> None:
    world = fetching_world()
    world.land(1, 1, at=1)
    assert world.pool.find_prefix(world.requests[1].hashes) == []
    world.land(1, 1)
    assert world.pool.find_prefix(world.requests[1].hashes) == [0, 1]
    assert [(event.kind, event.block_hash) for event in world.pool.drain_events()] == [
        (KVEventKind.PUBLISH, world.requests[1].hashes[0]),
        (KVEventKind.PUBLISH, world.requests[1].hashes[1]),
    ]


@pytest.mark.parametrize(("landed", "cached"), [([0], 4), ([1, 2], 0), ([0, 2], 4), ([], 0)])
def test_what_did_not_come_is_computed_into_the_same_blocks(landed: list[int], cached: int) -> None:
    world = fetching_world()
    for number, place in enumerate(landed):
        world.land(1, 1, at=place - number)
    world.end_fetch(1)
    plan = world.step()
    assert list(plan.started[0].blocks) == [0, 1, 2, 3, 4]
    assert plan.chunks[0].start == cached
    world.run_to_end()
    world.check_answers()
    world.check_empty()


def test_a_late_read_keeps_its_blocks_and_the_request_gets_others() -> None:
    world = fetching_world()
    world.submit(B[:4])
    world.land(1, 1)
    world.end_fetch(1, num_in_flight=1)
    assert states(world, range(5)) == ["cached", "free", "quarantined", "free", "free"]
    plan = world.step()
    assert [start.tokens for start in plan.started] == [A[:18], B[:4]], "it has kept its rank"
    assert 2 not in plan.started[0].blocks
    assert plan.started[0].blocks[0] == 0, "what had landed is found"
    assert not world.reads, "it does not fetch again"
    world.write_late()
    world.run_to_end()
    world.check_answers()
    world.check_empty()


def test_others_compute_meanwhile_and_the_head_of_the_line_fetches_without_any_budget() -> None:
    world = PrefillWorld(budget=4)
    world.submit(B[:8])
    world.submit(A[:18], elsewhere=[range(3)])
    world.submit(B[20:23])
    assert world.step().chunks == [Chunk(0, 0, 4)]
    assert world.fetch(2).blocks == [2, 3, 4, 5, 6]
    assert world.step().chunks == [Chunk(0, 4, 8, (0,))]
    assert world.step().chunks == [Chunk(0, 0, 3, (0,))]
    world.land(2)
    world.end_fetch(2)
    assert world.step().chunks == [Chunk(0, 12, 16)]


def test_the_second_with_a_prefix_waits_for_the_fetch_of_the_first() -> None:
    world = fetching_world()
    world.submit([*A[:12], 7], elsewhere=[range(3)])
    world.submit(B[:4])
    assert [start.tokens for start in world.step().started] == [B[:4]], "it is out of the way meanwhile"
    assert list(world.reads) == [1]
    assert world.scheduler.num_waiting == 2
    world.land(1)
    world.end_fetch(1)
    plan = world.step()
    assert [(start.tokens[-1], list(start.blocks)[:3]) for start in plan.started] == [
        (A[17], [0, 1, 2]),
        (7, [0, 1, 2]),
    ]
    world.run_to_end()
    world.check_answers()
    world.check_empty()


def test_who_waits_for_the_beginning_of_a_fetch_goes_on_when_that_has_landed() -> None:
    world = fetching_world()
    world.submit([*A[:8], 7])
    world.step()
    world.land(1, 1)
    assert world.step().is_empty
    world.land(1, 1)
    assert world.step().chunks == [Chunk(0, 8, 9, (0,))]
    world.run_to_end()
    world.check_answers()


def test_the_second_fetches_itself_what_the_first_could_not() -> None:
    world = fetching_world()
    world.submit([*A[:12], 7], elsewhere=[range(3)])
    world.step()
    world.drop(1, num_in_flight=2)
    world.step()
    assert list(world.reads) == [2]
    world.land(2)
    world.run_to_end()
    world.check_answers()
    world.check_empty()


def test_one_that_waits_for_another_s_fetch_can_be_cancelled() -> None:
    world = fetching_world()
    world.submit([*A[:12], 7])
    world.step()
    world.drop(2)
    assert world.scheduler.num_waiting == 1
    world.run_to_end()
    world.check_answers()
    world.check_empty()


@pytest.mark.parametrize("num_landed", [0, 1, 3])
@pytest.mark.parametrize("num_in_flight", [0, 1, 3])
@pytest.mark.parametrize("ended", [False, True])
def test_cancelled_at_any_moment_only_what_is_written_is_kept(num_landed: int, num_in_flight: int, ended: bool) -> None:
    world = fetching_world()
    world.land(1, num_landed)
    if ended:
        world.end_fetch(1)
    world.drop(1, num_in_flight)
    in_flight = 0 if ended else min(num_in_flight, 3 - num_landed)
    ledger = world.pool.ledger()
    assert (ledger.landing, ledger.cached, ledger.active) == (in_flight, num_landed, 0)
    world.run_to_end()
    world.check_empty()


def test_past_the_share_of_quarantine_everything_is_computed() -> None:
    world = fetching_world(num_blocks=16)
    world.end_fetch(1, num_in_flight=3)
    world.submit(A[20:38], elsewhere=[range(4)])
    world.run_to_end()
    world = fetching_world(num_blocks=11)
    world.end_fetch(1, num_in_flight=3)
    world.submit(B[:18], elsewhere=[range(4)])
    world.drop(1)
    assert world.step().chunks == [Chunk(0, 0, 16)]
    assert not world.reads


def test_no_more_than_half_of_the_pool_waits_for_fetches() -> None:
    world = PrefillWorld(num_blocks=12)
    for tokens in (A[:18], A[20:38], B[:18]):
        world.submit(tokens, elsewhere=[range(4)])
    world.step()
    assert list(world.reads) == [1, 2]
    world.run_to_end()
    world.check_answers()


@pytest.mark.parametrize(
    ("elsewhere", "end"),
    [
        ([range(2)], 2),
        ([range(2, 4), range(2)], 4),
        ([range(1), range(2, 4)], 1),
        ([range(900)], 4),
        ([range(1, 3)], 0),
        ([range(3, 1)], 0),
    ],
)
def test_only_what_is_contiguous_is_fetched_and_a_token_is_left(elsewhere: list[range], end: int) -> None:
    world = PrefillWorld()
    world.submit(A[:20], elsewhere=elsewhere)
    world.step()
    assert [fetch.end for fetch in world.scheduler.fetching()] == ([end] if end else [])
    world.run_to_end()
    world.check_answers()


def test_what_is_here_is_not_fetched() -> None:
    world = PrefillWorld()
    world.submit(A[:12])
    world.run_to_end()
    world.submit([*A[:12], 3], elsewhere=[range(3)])
    assert world.step().chunks == [Chunk(0, 12, 13, (0,))]
    assert world.pool.state(0) is BlockState.LENT


# -- before it is their turn ------------------------------------------------------------------------------------------

C = list(range(300, 340))
D = list(range(400, 440))


def queueing_world(**options: int) -> PrefillWorld:
    """Request 1 computes 4 tokens a step of 8; request 2 waits; request 3 fetches blocks 0 to 2 of 18 tokens."""
    world = PrefillWorld(**{"budget": 4, **options})  # type: ignore[arg-type]
    world.submit(B[:8])
    world.submit(C[:8])
    world.submit(A[:18], elsewhere=[range(3)])
    assert world.step().chunks == [Chunk(0, 0, 4)]
    return world


def test_a_fetch_begins_while_those_before_it_wait_and_nobody_is_overtaken() -> None:
    world = queueing_world()
    assert (world.fetch(3).blocks, world.fetch(3).end) == ([2, 3, 4, 5, 6], 3)
    assert (world.scheduler.num_waiting, world.scheduler.waiting_tokens) == (2, 4 + 8 + 6)
    world.land(3)
    world.end_fetch(3)
    assert world.step().chunks == [Chunk(0, 4, 8, (0,))]
    plan = world.step()
    assert [start.tokens for start in plan.started] == [C[:8]], "it is not its turn"
    assert world.step().chunks == [Chunk(0, 4, 8, (0,))]
    plan = world.step()
    assert (list(plan.started[0].blocks), plan.chunks) == ([2, 3, 4, 5, 6], [Chunk(0, 12, 16)])
    world.run_to_end()
    world.check_answers()
    world.check_empty()


def test_a_fetch_that_is_not_over_when_its_turn_has_come_lets_others_pass() -> None:
    world = queueing_world()
    world.submit(D[:4])
    for _ in range(3):
        world.step()
    assert [start.tokens for start in world.step().started] == [D[:4]]
    world.land(3)
    world.end_fetch(3)
    assert world.step().chunks == [Chunk(0, 12, 16)]


def test_nobody_takes_ahead_of_its_turn_what_those_before_it_need() -> None:
    """Request 3 needs five blocks, and those before it four: nine are not there."""
    world = queueing_world(num_blocks=8)
    assert world.reads == {}
    world.step()
    world.drop(1)
    world.step()
    assert list(world.reads) == [3], "it is the head of the line now"
    assert world.fetch(3).blocks == [4, 5, 6, 7, 1]
    world.run_to_end()
    world.check_answers()
    world.check_empty()


def test_what_those_before_it_would_find_here_is_not_evicted_for_it() -> None:
    world = PrefillWorld(budget=8, num_blocks=12)
    world.submit(C[:8])
    world.submit(D[:8])
    world.step()
    world.step()
    for request_id in (1, 2):
        world.drop(request_id)
    assert world.pool.next_evicted(4) == [1, 0, 3, 2]
    world.submit(B[:12])
    world.submit([*C[:8], 7])
    # Six blocks at most: four are free, one is not there, and request 4 would find two of the cached ones.
    world.submit(A[:18], elsewhere=[range(3)])
    world.step()
    assert world.fetch(5).blocks == [7, 8, 9, 10, 11]
    assert world.pool.find_prefix(world.requests[4].hashes) == [0, 1]
    assert world.pool.num_available == 4


def test_so_many_read_ahead_and_no_more_of_the_pool_than_half() -> None:
    world = PrefillWorld(budget=4, num_blocks=64)
    world.submit(B[:8])
    world.submit(C[:8])
    for number in range(8):
        world.submit([1000 + 100 * number + at for at in range(18)], elsewhere=[range(3)])
    world.step()
    assert list(world.reads) == [3, 4, 5, 6]
    world.land(3)
    world.end_fetch(3)
    world.step()
    assert list(world.reads) == [4, 5, 6, 7], "one has ended"
    little = PrefillWorld(budget=4, num_blocks=20)
    little.submit(B[:8])
    little.submit(C[:4])
    for number in range(3):
        little.submit([1000 + 100 * number + at for at in range(18)], elsewhere=[range(3)])
    little.step()
    assert list(little.reads) == [3, 4], "ten blocks of twenty"


def test_only_the_next_few_in_line_fetch_ahead() -> None:
    world = PrefillWorld(budget=4, num_blocks=64)
    for number in range(LOOK_AHEAD + 1):
        world.submit([1000 + 100 * number + at for at in range(4)])
    world.submit(A[:18], elsewhere=[range(3)])
    world.step()
    assert world.reads == {}
    world.step()
    assert list(world.reads) == [LOOK_AHEAD + 2]


def test_a_cancel_or_a_late_read_ahead_of_its_turn_leaves_nothing_behind() -> None:
    for is_cancelled in (True, False):
        world = queueing_world()
        if is_cancelled:
            world.drop(3, num_in_flight=2)
        else:
            world.end_fetch(3, num_in_flight=2)
        world.write_late()
        plans = [world.step() for _ in range(4)]
        assert plans[1].started[0].tokens == C[:8]
        assert world.reads == {}, "it fetches no more"
        world.run_to_end()
        world.check_answers()
        world.check_empty()


def test_who_has_fetched_goes_on_where_the_head_of_the_line_finds_no_room() -> None:
    world = PrefillWorld(budget=4, num_blocks=16)
    world.submit(B[:8])
    world.submit(C[:8])
    world.submit(A[:18], elsewhere=[range(3)])
    world.step()
    world.submit(D[:40], priority=-1)
    world.land(3)
    world.end_fetch(3)
    plans = [world.step() for _ in range(3)]
    # Ten blocks for request 4 are not there while request 3 holds five and request 1 its two, computed and lent.
    assert [list(plan.started[0].blocks) for plan in plans if plan.started] == [[2, 3, 4, 5, 6]]
    world.run_to_end()
    world.check_answers()
    world.check_empty()


# -- by itself --------------------------------------------------------------------------------------------------------


def claimed(pool: BlockPool) -> PrefixFetches:
    """Two prompts of three blocks, of which two are read."""
    fetches = PrefixFetches(PromptTables(pool, Window(0, 4), 16))
    for request_id, tokens in ((1, A[:9]), (2, B[:9])):
        assert fetches.claim(make_request(request_id, tokens, block_size=4), LeadingBlocks(), 2)
    return fetches


def test_what_lands_for_a_request_that_is_gone_is_free() -> None:
    pool = BlockPool(12, epoch=1)
    fetches = claimed(pool)
    first, _ = fetches.drain_granted()
    read = first.blocks[:2]
    assert fetches.drop(1, read)
    assert pool.ledger().landing == 4
    fetches.landed(1, read)
    assert str(pool.ledger()) == "free=9 active=1 landing=2"


def test_a_request_that_is_gone_is_not_read_for() -> None:
    fetches = claimed(BlockPool(12, epoch=1))
    fetches.drop(1, ())
    assert [fetch.request.id for fetch in fetches.drain_granted()] == [2]


def test_of_those_that_can_go_on_the_first_in_line_is_first_and_waits_for_no_fetch() -> None:
    fetches = claimed(BlockPool(12, epoch=1))
    hashes = fetches.all()[0].request.hashes
    assert fetches.will_find(hashes, 0)
    for request_id in (2, 1):
        fetches.end(request_id, ())
    assert not fetches.will_find(hashes, 0), "nothing came, and nothing more comes"
    ended = fetches.first_ended()
    assert ended is not None
    assert ended.request.id == 1

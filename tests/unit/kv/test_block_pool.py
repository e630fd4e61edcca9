from collections.abc import Callable

import numpy as np
import pytest

from tailrace.kv.block_pool import BlockPool, BlockState, KVEvent, KVEventKind, Ledger

EPOCH = 7


def make_pool(num_blocks: int = 8) -> BlockPool:
    return BlockPool(num_blocks, epoch=EPOCH)


def hashes_of(name: str, count: int) -> list[bytes]:
    return [f"{name}{index}".encode() for index in range(count)]


def write_sequence(pool: BlockPool, name: str, count: int) -> list[int]:
    """A sequence of `count` full blocks that this worker computed and still holds."""
    blocks = pool.allocate(count)
    assert blocks is not None
    for block, block_hash in zip(blocks, hashes_of(name, count), strict=True):
        pool.register(block, block_hash)
    return blocks


def cache_sequence(pool: BlockPool, name: str, count: int) -> list[int]:
    blocks = write_sequence(pool, name, count)
    pool.release(blocks)
    return blocks


def allocated(pool: BlockPool, count: int) -> list[int]:
    blocks = pool.allocate(count)
    assert blocks is not None
    return blocks


def landing(pool: BlockPool, count: int) -> list[int]:
    blocks = pool.allocate_landing(count)
    assert blocks is not None
    return blocks


def published(name: str, *indices: int) -> list[KVEvent]:
    return [KVEvent(KVEventKind.PUBLISH, f"{name}{index}".encode()) for index in indices]


def retracted(name: str, *indices: int) -> list[KVEvent]:
    return [KVEvent(KVEventKind.RETRACT, f"{name}{index}".encode()) for index in indices]


# -- allocation and reuse ---------------------------------------------------------------------------------------------


def test_fresh_blocks_come_in_order() -> None:
    pool = make_pool()
    assert allocated(pool, 3) == [0, 1, 2]
    assert allocated(pool, 2) == [3, 4]
    assert str(pool.ledger()) == "free=3 active=5"


def test_freed_blocks_come_back_first_and_in_table_order() -> None:
    pool = make_pool()
    pool.release(allocated(pool, 3))
    assert allocated(pool, 4) == [0, 1, 2, 3]


def test_allocate_gives_all_or_nothing() -> None:
    pool = make_pool(4)
    allocated(pool, 1)
    before = (pool.stamps.copy(), pool.ledger())
    assert pool.allocate(4) is None
    assert (pool.stamps == before[0]).all()
    assert pool.ledger() == before[1]
    assert pool.allocate(0) == []


def test_prefix_of_a_finished_sequence_is_found_and_reused() -> None:
    pool = make_pool()
    assert cache_sequence(pool, "a", 3) == [0, 1, 2]
    assert pool.find_prefix([b"a0", b"a1", b"b2"]) == [0, 1]
    assert str(pool.ledger()) == "free=5 cached=3"
    pool.acquire([0, 1])
    assert str(pool.ledger()) == "free=5 active=2 cached=1"
    assert allocated(pool, 2) == [3, 4]


def test_prefix_of_a_running_sequence_is_shared() -> None:
    pool = make_pool()
    blocks = write_sequence(pool, "a", 2)
    assert pool.find_prefix(hashes_of("a", 3)) == blocks
    pool.acquire(blocks)
    assert [pool.num_references(block) for block in blocks] == [2, 2]
    pool.release(blocks)
    assert str(pool.ledger()) == "free=6 active=2"
    pool.release(blocks)
    assert str(pool.ledger()) == "free=6 cached=2"


def test_prefix_stops_at_the_first_gap() -> None:
    pool = make_pool(3)
    cache_sequence(pool, "a", 3)
    assert pool.find_prefix([b"x", b"a1"]) == []
    allocated(pool, 1)
    assert pool.find_prefix(hashes_of("a", 3)) == [0, 1]


def test_unregistered_blocks_are_free_after_release_and_not_findable() -> None:
    pool = make_pool()
    blocks = allocated(pool, 2)
    pool.register(blocks[0], b"a0")
    pool.release(blocks)
    assert str(pool.ledger()) == "free=7 cached=1"
    assert pool.find_prefix([b"a0", b"a1"]) == [0]
    assert pool.hash_of(0) == b"a0"
    assert pool.hash_of(1) is None


def test_the_first_of_two_equal_blocks_stays_registered() -> None:
    pool = make_pool()
    first, second = allocated(pool, 2)
    pool.register(first, b"same")
    pool.register(second, b"same")
    assert pool.find_prefix([b"same"]) == [first]
    pool.release([second])
    assert str(pool.ledger()) == "free=7 active=1"
    assert pool.drain_events() == [KVEvent(KVEventKind.PUBLISH, b"same")]


def test_without_prefix_caching_nothing_is_findable() -> None:
    pool = BlockPool(4, epoch=EPOCH, prefix_caching=False)
    cache_sequence(pool, "a", 2)
    assert pool.find_prefix([b"a0"]) == []
    assert str(pool.ledger()) == "free=4"
    assert pool.drain_events() == []


# -- eviction order ---------------------------------------------------------------------------------------------------


def evicted(pool: BlockPool, count: int) -> list[int]:
    """Blocks that `allocate` takes from the cache, once nothing is free."""
    return allocated(pool, count)


def test_the_tail_of_a_sequence_is_evicted_before_its_head() -> None:
    pool = make_pool(3)
    cache_sequence(pool, "a", 3)
    assert evicted(pool, 2) == [2, 1]
    assert pool.find_prefix(hashes_of("a", 3)) == [0]


def test_the_least_recently_released_sequence_is_evicted_first() -> None:
    pool = make_pool(4)
    first, second = write_sequence(pool, "a", 2), write_sequence(pool, "b", 2)
    pool.release(second)
    pool.release(first)
    assert evicted(pool, 4) == [3, 2, 1, 0]


def test_use_makes_a_prefix_recent_again() -> None:
    pool = make_pool(4)
    first = cache_sequence(pool, "a", 2)
    cache_sequence(pool, "b", 2)
    pool.acquire(first)
    pool.release(first)
    assert evicted(pool, 4) == [3, 2, 1, 0]


def test_looking_a_prefix_up_does_not_make_it_recent() -> None:
    pool = make_pool(4)
    cache_sequence(pool, "a", 2)
    cache_sequence(pool, "b", 2)
    pool.find_prefix(hashes_of("a", 2))
    assert evicted(pool, 4) == [1, 0, 3, 2]


def test_free_blocks_go_before_cached_ones() -> None:
    pool = make_pool(4)
    cache_sequence(pool, "a", 2)
    assert allocated(pool, 3) == [2, 3, 1]


def test_a_shared_head_outlives_both_tails() -> None:
    pool = make_pool(4)
    head = write_sequence(pool, "h", 2)
    (first,), (second,) = write_sequence(pool, "a", 1), write_sequence(pool, "b", 1)
    pool.acquire(head)
    pool.release([*head, first])
    pool.release([*head, second])
    assert evicted(pool, 4) == [first, second, 1, 0]


def test_held_blocks_are_never_evicted() -> None:
    pool = make_pool(4)
    active, lent = write_sequence(pool, "a", 1), cache_sequence(pool, "b", 1)
    pool.lend(lent)
    assert pool.num_available == 2
    assert pool.allocate(3) is None
    assert pool.find_prefix([b"a0"]) == active
    assert pool.find_prefix([b"b0"]) == lent


# -- lending ----------------------------------------------------------------------------------------------------------


def test_lent_blocks_outlive_their_sequence() -> None:
    pool = make_pool()
    blocks = write_sequence(pool, "a", 2)
    pool.lend(blocks)
    assert pool.state(0) is BlockState.ACTIVE
    pool.release(blocks)
    assert str(pool.ledger()) == "free=6 lent=2"
    pool.unlend(blocks)
    assert str(pool.ledger()) == "free=6 cached=2"


def test_lends_are_counted() -> None:
    pool = make_pool()
    blocks = cache_sequence(pool, "a", 1)
    pool.lend(blocks)
    pool.lend(blocks)
    assert pool.num_lends(0) == 2
    pool.unlend(blocks)
    assert pool.state(0) is BlockState.LENT
    pool.unlend(blocks)
    assert pool.state(0) is BlockState.CACHED


def test_a_lent_partial_block_is_free_afterwards() -> None:
    pool = make_pool()
    blocks = allocated(pool, 1)
    pool.lend(blocks)
    pool.release(blocks)
    pool.unlend(blocks)
    assert str(pool.ledger()) == "free=8"


def test_lent_blocks_are_found_and_used_here_too() -> None:
    pool = make_pool()
    blocks = cache_sequence(pool, "a", 1)
    pool.lend(blocks)
    pool.acquire(pool.find_prefix([b"a0"]))
    assert pool.state(0) is BlockState.ACTIVE
    pool.unlend(blocks)
    assert pool.state(0) is BlockState.ACTIVE


def test_the_tail_of_a_lent_sequence_is_evicted_before_its_head() -> None:
    pool = make_pool(2)
    blocks = cache_sequence(pool, "a", 2)
    pool.lend(blocks)
    pool.unlend(blocks)
    assert evicted(pool, 2) == [1, 0]


# -- landing ----------------------------------------------------------------------------------------------------------


def test_a_read_lands() -> None:
    pool = make_pool()
    blocks = landing(pool, 2)
    assert str(pool.ledger()) == "free=6 landing=2"
    pool.landed(blocks)
    assert str(pool.ledger()) == "free=6 active=2"
    pool.register(blocks[0], b"a0")
    pool.release(blocks)
    assert str(pool.ledger()) == "free=7 cached=1"


def test_an_abandoned_read_frees_its_destination() -> None:
    pool = make_pool()
    pool.abandon_landing(landing(pool, 2))
    assert str(pool.ledger()) == "free=8"


@pytest.mark.parametrize(
    ("end", "ledger"),
    [(BlockPool.landed, "free=6 active=2"), (BlockPool.abandon_landing, "free=8")],
)
def test_quarantined_blocks_are_kept_apart_until_the_read_ends(
    end: Callable[[BlockPool, list[int]], None], ledger: str
) -> None:
    pool = make_pool()
    blocks = landing(pool, 2)
    pool.quarantine(blocks)
    assert str(pool.ledger()) == "free=6 quarantined=2"
    assert pool.num_available == 6
    assert pool.allocate(7) is None
    end(pool, blocks)
    assert str(pool.ledger()) == ledger


def test_landing_takes_cached_blocks_in_the_order_of_eviction() -> None:
    pool = make_pool(2)
    cache_sequence(pool, "a", 2)
    assert landing(pool, 1) == [1]
    assert pool.allocate_landing(2) is None
    assert str(pool.ledger()) == "cached=1 landing=1"


# -- generations ------------------------------------------------------------------------------------------------------


def counts(pool: BlockPool) -> list[int]:
    assert {int(stamp) >> 32 for stamp in pool.stamps} == {EPOCH}
    return [int(stamp) & 0xFFFFFFFF for stamp in pool.stamps]


def test_stamps_are_one_table_of_u64() -> None:
    pool = make_pool(3)
    assert pool.stamps.dtype == np.uint64
    assert pool.stamps.shape == (3,)
    assert pool.stamps.flags.c_contiguous
    assert pool.generation(0) == int(pool.stamps[0]) == EPOCH << 32


def test_every_handing_out_is_a_new_generation() -> None:
    pool = make_pool(3)
    blocks = allocated(pool, 2)
    assert counts(pool) == [1, 1, 0]
    pool.release(blocks)
    assert counts(pool) == [1, 1, 0]
    assert allocated(pool, 1) == [0]
    assert counts(pool) == [2, 1, 0]
    pool.abandon_landing(landing(pool, 2))
    assert counts(pool) == [2, 2, 1]


def test_eviction_is_a_new_generation_and_reuse_is_not() -> None:
    pool = make_pool(2)
    blocks = cache_sequence(pool, "a", 2)
    pool.acquire(blocks)
    pool.lend(blocks)
    pool.unlend(blocks)
    pool.release(blocks)
    assert counts(pool) == [1, 1]
    assert evicted(pool, 1) == [1]
    assert counts(pool) == [1, 2]


def test_landing_and_quarantine_keep_the_generation_of_the_read() -> None:
    pool = make_pool(1)
    blocks = landing(pool, 1)
    pool.quarantine(blocks)
    pool.landed(blocks)
    assert counts(pool) == [1]


def test_a_count_that_is_full_wraps_without_touching_the_epoch() -> None:
    pool = make_pool(1)
    pool.stamps[0] = (EPOCH << 32) | 0xFFFFFFFF
    allocated(pool, 1)
    assert counts(pool) == [0]


# -- events -----------------------------------------------------------------------------------------------------------


def test_events_tell_what_becomes_findable_and_what_no_longer_is() -> None:
    pool = make_pool(3)
    cache_sequence(pool, "a", 3)
    assert pool.drain_events() == published("a", 0, 1, 2)
    evicted(pool, 2)
    assert pool.drain_events() == retracted("a", 2, 1)
    assert pool.drain_events() == []


def test_reuse_is_no_event() -> None:
    pool = make_pool()
    blocks = cache_sequence(pool, "a", 2)
    pool.drain_events()
    pool.acquire(blocks)
    pool.register(blocks[0], b"a0")
    pool.release(blocks)
    assert pool.drain_events() == []


def test_what_came_and_went_between_two_drains_is_told_in_order() -> None:
    pool = make_pool(1)
    for name in "abc":
        cache_sequence(pool, name, 1)
    told = [*published("a", 0), *retracted("a", 0), *published("b", 0), *retracted("b", 0), *published("c", 0)]
    assert pool.drain_events() == told


def test_a_snapshot_before_the_drain_and_the_events_after_it_end_in_the_truth() -> None:
    pool = make_pool(1)
    cache_sequence(pool, "a", 1)
    held = set(pool.cached_hashes())
    cache_sequence(pool, "b", 1)
    for event in pool.drain_events():
        (held.add if event.kind is KVEventKind.PUBLISH else held.discard)(event.block_hash)
    assert held == set(pool.cached_hashes()) == {b"b0"}


def test_snapshot_names_every_findable_hash() -> None:
    pool = make_pool()
    cache_sequence(pool, "a", 2)
    write_sequence(pool, "b", 1)
    assert pool.cached_hashes() == [b"a0", b"a1", b"b0"]


# -- misuse -----------------------------------------------------------------------------------------------------------


def busy_pool() -> BlockPool:
    """Block 0 free · 1 active · 2 cached · 3 lent · 4 landing · 5 quarantined · 6 active and lent."""
    pool = make_pool(7)
    blocks = allocated(pool, 7)
    for block in (2, 3):
        pool.register(block, b"h%d" % block)
    pool.lend([3, 6])
    pool.release([0, 2, 3, 4, 5])
    assert landing(pool, 3) == [0, 4, 5]
    pool.quarantine([5])
    pool.abandon_landing([0])
    assert blocks == list(range(7))
    assert str(pool.ledger()) == "free=1 active=2 cached=1 lent=1 landing=1 quarantined=1"
    return pool


ALLOWED = {
    BlockPool.acquire: {1, 2, 3, 6},
    BlockPool.release: {1, 6},
    BlockPool.lend: {1, 2, 3, 6},
    BlockPool.unlend: {3, 6},
    BlockPool.landed: {4, 5},
    BlockPool.abandon_landing: {4, 5},
    BlockPool.quarantine: {4},
}


def books(pool: BlockPool) -> list[object]:
    return [pool.ledger(), pool.stamps.tolist(), pool.cached_hashes()] + [
        (pool.state(block), pool.num_references(block), pool.num_lends(block)) for block in range(pool.num_blocks)
    ]


@pytest.mark.parametrize("operation", ALLOWED)
def test_operations_take_blocks_of_their_states_only(operation: Callable[[BlockPool, list[int]], None]) -> None:
    for block in range(7):
        pool = busy_pool()
        before = books(pool)
        if block in ALLOWED[operation]:
            operation(pool, [block])
            pool.check_integrity()
            assert books(pool) != before
        else:
            with pytest.raises(ValueError, match=f"block {block}: it is "):
                operation(pool, [block])
            assert books(pool) == before


@pytest.mark.parametrize("operation", ALLOWED)
@pytest.mark.parametrize("bad", [-1, 7])
def test_one_bad_block_in_a_call_changes_nothing(operation: Callable[[BlockPool, list[int]], None], bad: int) -> None:
    pool = busy_pool()
    before = books(pool)
    good = min(ALLOWED[operation])
    with pytest.raises(ValueError, match="is not one of 0 to 6"):
        operation(pool, [good, bad])
    with pytest.raises(ValueError, match="twice in one call"):
        operation(pool, [good, good])
    assert books(pool) == before
    pool.check_integrity()


def test_a_double_release_is_refused() -> None:
    pool = make_pool()
    blocks = allocated(pool, 2)
    pool.release([blocks[1]])
    with pytest.raises(ValueError, match="cannot release block 1: it is free"):
        pool.release(blocks)
    assert str(pool.ledger()) == "free=7 active=1"


@pytest.mark.parametrize("block", [0, 4, 5])
def test_blocks_not_completely_written_cannot_be_registered(block: int) -> None:
    pool = busy_pool()
    with pytest.raises(ValueError, match="cannot register"):
        pool.register(block, b"new")
    assert pool.find_prefix([b"new"]) == []


def test_a_block_has_one_hash() -> None:
    pool = busy_pool()
    with pytest.raises(ValueError, match="another hash"):
        pool.register(2, b"new")
    assert pool.hash_of(2) == b"h2"


@pytest.mark.parametrize(("num_blocks", "epoch"), [(0, 1), (-1, 1), (1, -1), (1, 2**32)])
def test_impossible_pools_are_refused(num_blocks: int, epoch: int) -> None:
    with pytest.raises(ValueError, match=r"num_blocks|epoch"):
        BlockPool(num_blocks, epoch=epoch)


def test_negative_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="count"):
        make_pool().allocate(-1)


# -- books ------------------------------------------------------------------------------------------------------------


def test_ledger_balances_or_says_so() -> None:
    assert busy_pool().ledger().balances
    assert not Ledger(total=2, free=1, active=0, cached=0, lent=0, landing=0, quarantined=0).balances


def test_repr_is_the_ledger() -> None:
    assert repr(busy_pool()) == "<BlockPool 7: free=1 active=2 cached=1 lent=1 landing=1 quarantined=1>"


@pytest.mark.parametrize(
    ("book", "break_it"),
    [
        ("counts", lambda pool: pool._counts.__setitem__(0, 2)),
        ("state of block 1", lambda pool: pool._references.__setitem__(1, 0)),
        ("state of block 3", lambda pool: pool._lends.__setitem__(3, 0)),
        ("state of block 4", lambda pool: pool._references.__setitem__(4, 1)),
        ("list of FREE blocks", lambda pool: pool._free.clear()),
        ("list of CACHED blocks", lambda pool: pool._evictable.clear()),
        ("registered hashes", lambda pool: pool._by_hash.pop(b"h2")),
        ("epoch of block", lambda pool: pool.stamps.__setitem__(0, 1)),
    ],
)
def test_integrity_check_finds_a_broken_book(book: str, break_it: Callable[[BlockPool], object]) -> None:
    pool = busy_pool()
    pool.check_integrity()
    break_it(pool)
    with pytest.raises(AssertionError, match=book):
        pool.check_integrity()

"""What a pool says of its blocks: generations, events, refusals and books."""

from collections.abc import Callable

import numpy as np
import pytest

from tailrace.kv.block_pool import BlockPool, KVEvent, KVEventKind, Ledger
from tests.helpers.block_pools import EPOCH, allocated, cache_sequence, evicted, landing, make_pool, write_sequence


def published(name: str, *indices: int) -> list[KVEvent]:
    return [KVEvent(KVEventKind.PUBLISH, f"{name}{index}".encode()) for index in indices]


def retracted(name: str, *indices: int) -> list[KVEvent]:
    return [KVEvent(KVEventKind.RETRACT, f"{name}{index}".encode()) for index in indices]


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

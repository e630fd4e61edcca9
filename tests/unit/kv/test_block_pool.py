"""Which blocks a pool hands out, keeps and evicts, and in which order."""

from collections.abc import Callable

import pytest

from tailrace.kv.block_pool import BlockPool, BlockState, KVEvent, KVEventKind
from tests.helpers.block_pools import (
    EPOCH,
    allocated,
    cache_sequence,
    evicted,
    hashes_of,
    landing,
    make_pool,
    write_sequence,
)

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


def test_what_is_free_or_cached_is_handed_out_before_any_loan_is_revoked() -> None:
    pool, revoked = make_pool(6), []
    pool.lend_revocably(cache_sequence(pool, "a", 2), lambda: revoked.append("a"))
    cache_sequence(pool, "b", 2)
    assert str(pool.ledger()) == "free=2 cached=2 lent=2"
    assert pool.num_available == 6
    assert pool.allocate(4) is not None
    assert revoked == []
    assert str(pool.ledger()) == "active=4 lent=2"


def test_the_oldest_loan_is_revoked_first_and_its_blocks_get_new_generations() -> None:
    pool, revoked = make_pool(4), []
    first, second = cache_sequence(pool, "a", 2), cache_sequence(pool, "b", 2)
    pool.lend_revocably(second, lambda: revoked.append("b"))
    loan = pool.lend_revocably(first, lambda: revoked.append("a"))
    was = [pool.generation(block) for block in (*first, *second)]
    assert pool.allocate(1) == [second[1]]
    assert revoked == ["b"]
    assert [pool.generation(block) for block in first] == was[:2]
    assert pool.generation(second[1]) == was[3] + 1
    assert pool.generation(second[0]) == was[2], "it is cached, and good to read"
    assert str(pool.ledger()) == "active=1 cached=1 lent=2"
    pool.end_loan(loan)
    assert str(pool.ledger()) == "active=1 cached=3"
    pool.check_integrity()


def test_a_loan_of_what_a_sequence_holds_is_left_alone() -> None:
    """Revoking it would bring nothing."""
    pool, revoked = make_pool(4), []
    held = write_sequence(pool, "a", 2)
    pool.lend_revocably(held, lambda: revoked.append("a"))
    pool.lend_revocably(cache_sequence(pool, "b", 2), lambda: revoked.append("b"))
    assert pool.allocate(3) is None
    assert revoked == []
    assert pool.allocate(2) is not None
    assert revoked == ["b"]


def test_what_is_lent_for_good_is_never_handed_out() -> None:
    pool = make_pool(2)
    blocks = cache_sequence(pool, "a", 2)
    pool.lend(blocks)
    pool.lend_revocably(blocks, lambda: None)
    assert pool.num_available == 0
    assert pool.allocate(1) is None
    pool.unlend(blocks)
    assert pool.num_available == 2


# -- what would go next, and what belongs to it -----------------------------------------------------------------------


def test_the_next_to_be_evicted_are_named_in_order() -> None:
    pool = make_pool(8)
    a, b = cache_sequence(pool, "a", 2), cache_sequence(pool, "b", 3)
    assert pool.next_evicted(3) == [a[1], a[0], b[2]]
    assert pool.next_evicted(100) == [a[1], a[0], b[2], b[1], b[0]]
    assert pool.next_evicted(0) == pool.next_evicted(-1) == []
    assert (pool.num_free, pool.num_taken) == (3, 5)


def test_a_chain_is_known_from_its_last_block_while_all_of_it_is_there() -> None:
    pool = make_pool(4)
    blocks = allocated(pool, 3)
    for index, block_hash in enumerate(hashes := hashes_of("a", 3)):
        pool.register(blocks[index], block_hash, hashes[index - 1] if index else b"")
    assert pool.chain_of(blocks[2]) == hashes
    assert pool.chain_of(blocks[0]) == hashes[:1]
    assert pool.chain_of(3) == []
    pool.release(blocks)
    pool.acquire(blocks[1:])
    allocated(pool, 2)
    assert pool.chain_of(blocks[2]) == []


def test_a_block_is_its_tenant_s_for_as_long_as_it_can_be_found() -> None:
    pool = make_pool(2)
    first, second = allocated(pool, 2)
    pool.register(first, b"a", b"", "ann")
    pool.register(second, b"a", b"", "bob")
    assert (pool.tenant_of(first), pool.tenant_of(second)) == ("ann", ""), "the first one registered is the one to find"
    pool.release([first])
    assert pool.tenant_of(first) == "ann"
    assert allocated(pool, 1) == [first]
    assert pool.tenant_of(first) == "", "whoever left leaves no name behind"
    with pytest.raises(ValueError, match="not one of 0 to 1"):
        pool.tenant_of(2)

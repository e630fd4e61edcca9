"""Which chains are offered to a store, and how often it is looked for them."""

import random

from tailrace.kv.block_pool import BlockPool
from tailrace.policy import offers
from tailrace.policy.offers import CachedChain, OfferPolicy
from tests.helpers.block_pools import allocated, hashes_of


def cache_chain(pool: BlockPool, hashes: list[bytes], tenant: str = "") -> list[int]:
    """What of the chain is not there yet is computed; then nobody holds it."""
    found = pool.find_prefix(hashes)
    pool.acquire(found)
    blocks = [*found, *allocated(pool, len(hashes) - len(found))]
    for index in range(len(found), len(hashes)):
        pool.register(blocks[index], hashes[index], hashes[index - 1] if index else b"", tenant)
    pool.release(blocks)
    return blocks


def make(num_blocks: int = 10, low_water: float = 0.5, span: int = 0) -> tuple[BlockPool, OfferPolicy]:
    pool = BlockPool(num_blocks, epoch=7)
    return pool, OfferPolicy(pool, low_water=low_water, span=span)


def due(policy: OfferPolicy) -> list[list[bytes]]:
    return [list(chain.hashes) for chain in policy.due()]


def test_what_is_over_is_offered_as_far_as_it_is_cached() -> None:
    pool, policy = make()
    cache_chain(pool, hashes_of("a", 3))
    policy.note_over(hashes_of("a", 4), "")
    policy.note_over([], "")
    policy.note_over(hashes_of("b", 2), "")
    assert due(policy) == [hashes_of("a", 3)]
    assert due(policy) == []


def test_nothing_is_looked_for_while_enough_is_free() -> None:
    pool, policy = make()
    cache_chain(pool, hashes_of("a", 5))
    assert due(policy) == []
    cache_chain(pool, hashes_of("b", 1))
    assert due(policy) == [hashes_of("a", 5)]


def test_only_those_that_would_be_evicted_next_are_offered_and_only_once() -> None:
    pool, policy = make()
    for name in "abcd":
        cache_chain(pool, hashes_of(name, 2))
    # Two are free: the next three to go are both of a, and the tail of b.
    assert due(policy) == [hashes_of("a", 2), hashes_of("b", 2)]
    cache_chain(pool, hashes_of("e", 2))
    assert due(policy) == [hashes_of("c", 2)]
    cache_chain(pool, hashes_of("f", 2))
    assert pool.find_prefix(hashes_of("a", 1)) == []
    assert due(policy) == [hashes_of("d", 2)]


def test_a_block_that_held_something_else_in_between_is_offered_again() -> None:
    pool, policy = make(4, low_water=0.5)
    cache_chain(pool, hashes_of("a", 3))
    assert due(policy) == [hashes_of("a", 3)]
    cache_chain(pool, hashes_of("b", 4))
    cache_chain(pool, hashes_of("a", 4))
    assert due(policy) == [hashes_of("a", 4)]


def test_what_was_offered_when_it_was_over_is_not_offered_for_low_water() -> None:
    pool, policy = make()
    cache_chain(pool, hashes_of("a", 8))
    policy.note_over(hashes_of("a", 8), "")
    assert due(policy) == [hashes_of("a", 8)]
    pool.release(allocated(pool, 2))
    pool.release(allocated(pool, 2))
    pool.release(allocated(pool, 2))
    assert due(policy) == []


def test_a_chain_without_its_beginning_is_not_offered() -> None:
    pool, policy = make()
    blocks = cache_chain(pool, hashes_of("a", 4))
    # Its tail was used since, its head was not: as when two computed the same beginning.
    pool.acquire(blocks[1:])
    pool.release(blocks[1:])
    held = allocated(pool, 7)
    assert pool.find_prefix(hashes_of("a", 1)) == []
    assert due(policy) == []
    pool.release(held)


def test_choices_that_share_a_prompt_are_each_offered_from_the_first_block() -> None:
    pool, policy = make(12, low_water=0.5)
    prompt = hashes_of("p", 3)
    cache_chain(pool, [*prompt, b"x"])
    cache_chain(pool, [*prompt, b"y"])
    cache_chain(pool, hashes_of("z", 3))
    assert due(policy) == [[*prompt, b"x"], [*prompt, b"y"]]


def test_an_offer_names_the_tenant_whether_the_chain_is_over_or_was_looked_for() -> None:
    pool, policy = make(8, low_water=0.5)
    cache_chain(pool, hashes_of("a", 3), "ann")
    policy.note_over(hashes_of("a", 3), "ann")
    assert policy.due() == [CachedChain(hashes_of("a", 3), "ann")]
    cache_chain(pool, hashes_of("b", 2), "bob")
    assert policy.due() == []
    cache_chain(pool, hashes_of("c", 2))
    # Over a: b is the next to go.
    cache_chain(pool, hashes_of("d", 1), "dan")
    pool.release(allocated(pool, 3))
    assert CachedChain(hashes_of("b", 2), "bob") in policy.due()


def test_no_mark_means_no_looking() -> None:
    pool, policy = make(low_water=0.0)
    cache_chain(pool, hashes_of("a", 10))
    assert due(policy) == []


def test_looks_are_rare_and_go_through_a_bounded_number_of_blocks() -> None:
    pool, policy = make(40_000, low_water=0.5)
    chains = [hashes_of(f"{number} ", 100) for number in range(400)]
    for chain in chains:
        cache_chain(pool, chain)
    looks = 0
    for number in range(200):
        cache_chain(pool, hashes_of(f"new {number} ", 16))
        looked = due(policy)
        looks += bool(looked)
        assert sum(map(len, looked)) <= offers.MAX_AHEAD + 100
    assert looks <= 200 * 16 // (offers.MAX_AHEAD // 2) + 2


def test_in_steady_use_nothing_is_evicted_that_was_not_offered() -> None:
    """Chains come, are used again, and go, in a pool that is always full."""
    rng = random.Random(3)
    pool, policy = make(100, low_water=0.2)
    offered: set[bytes] = set()
    pool.drain_events()
    missed = evicted = 0
    for number in range(400):
        name = f"{number} " if rng.random() < 0.7 else f"{max(0, number - rng.randint(1, 8))} "
        cache_chain(pool, hashes_of(name, 1 + number % 7))
        gone = [event.block_hash for event in pool.drain_events() if event.kind == 2]
        evicted += len(gone)
        missed += sum(1 for each in gone if each not in offered)
        for chain in due(policy):
            offered.update(chain)
    assert evicted > 500
    assert missed == 0


# -- with a window ----------------------------------------------------------------------------------------------------


def test_with_a_window_what_is_over_is_offered_from_its_end_and_where_it_began() -> None:
    pool, policy = make(40, span=3)
    chain = hashes_of("a", 20)
    cache_chain(pool, chain)
    policy.note_over(chain, "")
    # And a block more: the same tokens once more would be gone on from one block before their end.
    assert due(policy) == [chain[16:]]
    policy.note_over(chain, "", 12)
    assert due(policy) == [chain[9:12], chain[16:]]
    for num_found, first in ((16, 13), (17, 14), (18, 15), (20, 16)):
        policy.note_over(chain, "", num_found)
        assert due(policy) == [chain[first:]]
    policy.note_over(chain[:2], "", 1)
    policy.note_over(chain[:1], "")
    assert due(policy) == [chain[:2], chain[:1]]


def test_with_a_window_a_hole_in_it_leaves_what_is_behind() -> None:
    pool, policy = make(40, span=3)
    chain = hashes_of("a", 10)
    blocks = cache_chain(pool, chain[:7])
    pool.acquire(blocks[1:])
    pool.release(allocated(pool, 34))
    pool.release(blocks[1:])
    cache_chain(pool, chain[1:])
    assert pool.find_each(chain)[0] is None
    policy.note_over(chain[:3], "")
    policy.note_over([*chain, b"not there"], "")
    assert due(policy) == [chain[1:3]]


def test_with_a_window_the_end_of_what_was_never_over_is_offered_for_low_water() -> None:
    pool, policy = make(20, span=3)
    # Its head is let go of while it runs, and never offered; it is cancelled.
    chain = hashes_of("a", 10)
    blocks = allocated(pool, 10)
    for index, block in enumerate(blocks):
        pool.register(block, chain[index], chain[index - 1] if index else b"")
    pool.release(blocks[:6])
    policy.pass_over(blocks[:6])
    held = allocated(pool, 10)
    assert due(policy) == []
    pool.release(blocks[6:])
    taken = allocated(pool, 5)
    assert due(policy) == [chain[7:]]
    taken += allocated(pool, 5)
    assert due(policy) == []
    pool.release([*held, *taken])


def test_with_a_window_the_ends_of_branches_are_each_offered_once() -> None:
    pool, policy = make(12, span=2)
    trunk = hashes_of("t", 4)
    cache_chain(pool, [*trunk, b"x"])
    cache_chain(pool, [*trunk, b"y"])
    cache_chain(pool, hashes_of("z", 3))
    assert sorted(due(policy)) == sorted([[trunk[3], b"x"], [trunk[3], b"y"]])
    assert due(policy) == []

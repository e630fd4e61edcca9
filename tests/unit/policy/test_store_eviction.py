"""Which block a tier gives up first."""

import random

import pytest

from tailrace.policy.store_eviction import MAX_COUNTED_USES, EvictionOrder, Usage


def order_of(*usages: Usage, capacity: int = 10) -> list[int]:
    """Slots, numbered as given, in the order in which they go."""
    order = EvictionOrder(capacity)
    for slot, usage in enumerate(usages):
        order.add(slot, usage)
    gone = []
    while (slot := order.victim()) is not None:
        gone.append(slot)
        order.remove(slot)
    return gone


def test_what_was_used_longest_ago_goes_first() -> None:
    assert order_of(Usage(3, 1, 0), Usage(1, 1, 0), Usage(2, 1, 0)) == [1, 2, 0]


def test_of_one_moment_the_deepest_goes_first() -> None:
    assert order_of(Usage(1, 1, 0), Usage(1, 1, 2), Usage(1, 1, 1)) == [1, 2, 0]


def test_a_doubling_of_uses_is_worth_half_a_turnover() -> None:
    assert order_of(Usage(0, 2, 0), Usage(4, 1, 0), Usage(6, 1, 0)) == [1, 0, 2]


def test_uses_beyond_the_limit_make_no_difference() -> None:
    popular = Usage(0, MAX_COUNTED_USES, 1), Usage(0, 1_000_000, 0)
    assert order_of(*popular) == [0, 1]


def test_a_block_is_never_worth_more_than_the_one_before_it() -> None:
    """Chains that share a prefix are used at random: what is left is always reachable from the root."""
    rng = random.Random(3)
    chains = [list(range(4)) + [10 * (i + 1) + j for j in range(4)] for i in range(5)]
    parents = {chain[i]: chain[i - 1] for chain in chains for i in range(1, len(chain))}
    uses: dict[int, Usage] = {}
    order = EvictionOrder(12)
    for moment in range(400):
        chain = rng.choice(chains)[: rng.randint(1, 8)]
        for depth, slot in enumerate(chain):
            uses[slot] = Usage(moment, uses[slot].uses + 1 if slot in uses else 1, depth)
            order.add(slot, uses[slot])
        while len(order) > 12:
            victim = order.victim()
            assert victim is not None
            order.remove(victim)
            del uses[victim]
        assert all(parents[slot] in order for slot in order.slots() if slot in parents)


def test_a_tenants_victim_is_its_own() -> None:
    order = EvictionOrder(4)
    order.add(0, Usage(1, 1, 0, "a"))
    order.add(1, Usage(2, 1, 0, "b"))
    order.set_apart("b")
    order.set_apart("c")
    assert (order.victim(), order.victim("b"), order.victim("c")) == (0, 1, None)
    order.add(2, Usage(1, 1, 0, "b"))
    order.add(3, Usage(0, 1, 0, "c"))
    assert (order.victim(), order.victim("b"), order.victim("c")) == (3, 2, 3)
    order.remove(3)
    assert (order.victim(), order.victim("c")) == (0, None)
    assert (order.num_of("a"), order.num_of("b"), order.num_of("c")) == (1, 2, 0)


def test_only_a_tenant_that_is_set_apart_has_a_victim_of_its_own() -> None:
    order = EvictionOrder(4)
    order.add(0, Usage(1, 1, 0, "a"))
    order.set_apart("a")
    order.set_apart("a")
    assert order.victim("a") == 0
    order.put_back("a")
    order.put_back("a")
    with pytest.raises(ValueError, match="'a' is not set apart"):
        order.victim("a")
    assert order.victim() == 0


def test_what_thousands_of_tenants_had_leaves_nothing_and_costs_nothing() -> None:
    order = EvictionOrder(4)
    for moment in range(10_000):
        order.add(moment % 4, Usage(moment, 1, 0, f"tenant {moment}"))
    assert len(order._num_of) == 4
    assert len(order._all) < 100
    assert order.victim() == 0
    assert not order._apart


def test_the_order_of_one_tenant_is_that_of_all_without_the_others() -> None:
    """Used, removed and set apart at random: always as if sorted anew."""
    rng = random.Random(5)
    order, uses = EvictionOrder(30), dict[int, Usage]()
    for moment in range(3000):
        slot, tenant = rng.randrange(30), rng.choice("abc")
        if rng.random() < 0.3:
            order.remove(slot)
            uses.pop(slot, None)
        else:
            uses[slot] = Usage(moment, 1, rng.randrange(5), tenant)
            order.add(slot, uses[slot])
        if rng.random() < 0.1:
            rng.choice([order.set_apart, order.put_back])("a")
        order.set_apart("b")
        for name in {"b", None, *order._apart}:
            left = [each for each in uses if name is None or uses[each].tenant == name]
            assert order.victim(name) == min(left, key=lambda each: uses[each].moment, default=None)


def test_what_is_removed_or_used_again_is_not_named_for_its_old_worth() -> None:
    order = EvictionOrder(4)
    order.add(0, Usage(1, 1, 0))
    order.add(1, Usage(2, 1, 0))
    order.add(0, Usage(3, 1, 0))
    assert order.victim() == 1
    order.remove(1)
    order.remove(1)
    assert order.victim() == 0
    assert len(order) == 1


def test_the_heap_does_not_grow_with_the_number_of_uses() -> None:
    order = EvictionOrder(4)
    order.set_apart("")
    for moment in range(10_000):
        order.add(moment % 4, Usage(moment, 1, 0))
    assert len(order._all) < 100
    assert len(order._apart[""]) < 100


@pytest.mark.parametrize("tenant", ["", "a"])
def test_nothing_to_give_up(tenant: str) -> None:
    order = EvictionOrder(1)
    order.set_apart(tenant)
    assert order.victim(tenant) is order.victim() is None

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.policy.eviction import EVICTIONS, MAX_USES, GreedyDual, LeastRecentlyUsed


def drained(order) -> str:
    return "".join(order.pop() for _ in range(len(order)))


@pytest.mark.parametrize("make", EVICTIONS.values(), ids=EVICTIONS)
def test_among_equals_the_oldest_goes_first(make) -> None:
    order = make()
    for key in "cab":
        order.add(key)
    assert "a" in order
    assert drained(order) == "cab"
    with pytest.raises(KeyError):
        order.pop()


@pytest.mark.parametrize("make", EVICTIONS.values(), ids=EVICTIONS)
def test_what_is_held_again_is_not_evicted(make) -> None:
    order = make()
    for key in "abc":
        order.add(key)
    order.remove("a")
    assert "a" not in order
    with pytest.raises(KeyError):
        order.remove("a")
    order.add("a")
    assert drained(order) == "bca"


def test_recency_alone_forgets_what_was_used_often() -> None:
    order = LeastRecentlyUsed()
    for key in "aaaab":
        order.add(key)
    order.add("c")
    assert drained(order) == "abc"


def test_what_was_used_often_outlives_what_is_new() -> None:
    order = GreedyDual()
    for key in "aaab":
        order.add(key)
    order.add("c")
    assert drained(order) == "bca"


def test_old_uses_fade_as_others_come_and_go() -> None:
    order = GreedyDual()
    for _ in range(3):
        order.add("a")
    evicted = []
    for number in range(6):
        order.add(f"n{number}")
        order.add(f"n{number}")
        if len(order) > 2:
            evicted.append(order.pop())
    assert "a" in evicted


def test_uses_beyond_the_bound_count_no_more() -> None:
    order = GreedyDual()
    for _ in range(1000):
        order.add("a")
    for _ in range(MAX_USES):
        order.add("b")
    assert drained(order) == "ab"


@given(st.lists(st.integers(1, 6), min_size=1, max_size=60))
def test_a_root_outlives_its_leaves(depths: list[int]) -> None:
    """Prompts of one tree, each used tail first: whatever is evicted, what is left is closed under prefixes."""
    for make in EVICTIONS.values():
        order = make()
        for branch, depth in enumerate(depths):
            chain = [("root", i) if i < 3 else (branch % 3, i) for i in range(depth)]
            for key in reversed(chain):
                order.add(key)
            while len(order) > 7:
                order.pop()
            left = {key for key in [("root", i) for i in range(3)] if key in order}
            assert left == {("root", i) for i in range(len(left))}


def test_the_heap_does_not_grow_with_uses() -> None:
    order = GreedyDual()
    for number in range(10_000):
        order.add(number % 10)
    assert len(order) == 10
    assert len(order._heap) <= 100

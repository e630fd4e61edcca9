import pytest

from tailrace.policy.reservations import Reservations

A, B, C, D = (letter.encode() for letter in "abcd")


def test_backlog_is_what_was_sent_less_what_the_head_can_have_done() -> None:
    held = Reservations()
    assert held.backlog_s("p0", 5.0) == 0.0
    held.hold("p0", 1, [], 2.0, 10.0, num_tokens=0)
    held.hold("p0", 2, [], 3.0, 11.0, num_tokens=0)
    assert held.backlog_s("p0", 10.0) == 5.0
    assert held.backlog_s("p0", 11.5) == 3.5
    # The first is late: the second cannot have begun.
    assert held.backlog_s("p0", 99.0) == 3.0
    held.release("p0", 1, 100.0)
    assert held.backlog_s("p0", 101.0) == 2.0
    held.release("p0", 2, 103.0)
    assert held.backlog_s("p0", 103.0) == 0.0
    assert held.backlog_s("p1", 103.0) == 0.0


def test_backlog_in_tokens_is_that_of_whole_prompts() -> None:
    held = Reservations()
    assert held.backlog_tokens() == {}
    held.hold("p0", 1, [], 2.0, 0.0, num_tokens=1000)
    held.hold("p0", 2, [], 0.0, 0.0, num_tokens=500)
    assert held.backlog_tokens() == {"p0": 1500}
    held.release("p0", 1, 9.0)
    assert held.backlog_tokens() == {"p0": 500}
    held.release("p0", 2, 9.0)
    assert held.backlog_tokens() == {}


def test_one_that_is_released_out_of_turn_leaves_the_head_running() -> None:
    held = Reservations()
    held.hold("p0", 1, [], 2.0, 0.0, num_tokens=0)
    held.hold("p0", 2, [], 3.0, 0.0, num_tokens=0)
    held.release("p0", 2, 1.0)
    assert held.backlog_s("p0", 1.5) == 0.5
    held.release("p0", 2, 1.6)
    held.release("p9", 1, 1.6)
    assert (held.num_held("p0"), held.num_held("p9")) == (1, 0)


def test_a_handle_is_held_once() -> None:
    held = Reservations()
    held.hold("p0", 1, [], 1.0, 0.0, num_tokens=0)
    held.hold("p1", 1, [], 1.0, 0.0, num_tokens=0)
    with pytest.raises(ValueError, match="handle 1 of p0 is held already"):
        held.hold("p0", 1, [], 1.0, 0.0, num_tokens=0)


def test_blocks_that_will_be_there_go_on_where_the_index_ends() -> None:
    held = Reservations()
    held.hold("p0", 1, [A, B, C], 1.0, 0.0, num_tokens=0)
    held.hold("p1", 2, [A], 1.0, 0.0, num_tokens=0)
    assert held.extend({}, [A, B, C, D]) == {"p0": 3, "p1": 1}
    assert held.extend({"p1": 2, "p2": 1}, [A, B, C, D]) == {"p0": 3, "p1": 2, "p2": 1}
    assert held.extend({}, [D, A]) == {}
    assert held.extend({"p0": 4}, [A, B, C, D]) == {"p0": 4, "p1": 1}


def test_a_block_expected_twice_is_expected_until_both_are_gone() -> None:
    held = Reservations()
    held.hold("p0", 1, [A, B], 1.0, 0.0, num_tokens=0)
    held.hold("p0", 2, [A], 1.0, 0.0, num_tokens=0)
    held.release("p0", 1, 1.0)
    assert held.extend({}, [A, B]) == {"p0": 1}
    held.release("p0", 2, 2.0)
    assert held.extend({}, [A, B]) == {}

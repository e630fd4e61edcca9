"""The rule that excuses differences in bfloat16 must not excuse anything else."""

import pytest

from tests.helpers.neartie import Comparison, assert_equal_but_for_near_ties, first_difference, is_near_tie

TOP = ((7, -1.0), (8, -1.3), (9, -1.4), (10, -3.0), (11, -3.1), (12, -3.2))


def test_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 5, 3], [1, 2, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2


@pytest.mark.parametrize(("one", "other", "excused"), [(7, 8, True), (8, 7, True), (7, 9, False), (11, 12, False)])
def test_only_likely_tokens_close_together_are_a_near_tie(one: int, other: int, excused: bool) -> None:
    assert is_near_tie(TOP, one, other) is excused


def _comparison(actual: list[int], expected: list[int]) -> Comparison:
    return Comparison("p", actual, expected, lambda index: TOP)


def test_too_few_equal_ones_fail() -> None:
    same, tied = _comparison([7, 7], [7, 7]), _comparison([7, 8], [7, 7])
    assert_equal_but_for_near_ties([same, tied], min_equal=1)
    with pytest.raises(AssertionError, match="1 of 2 are equal, 2 must be"):
        assert_equal_but_for_near_ties([same, tied], min_equal=2)


@pytest.mark.parametrize("actual", [[7, 9], [7], [7, 7, 7]])
def test_real_differences_fail(actual: list[int]) -> None:
    with pytest.raises(AssertionError, match="p: "):
        assert_equal_but_for_near_ties([_comparison(actual, [7, 7])], min_equal=0)

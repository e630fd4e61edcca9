"""When two greedy generations in bfloat16 may differ.

Logits in bfloat16 tie exactly at ordinary positions, and the shape of a batch decides which of two near-equal tokens
wins. So a difference is excused where the reference itself held both tokens for almost equally likely; what follows the
first difference is another text and is not compared.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Top = Sequence[tuple[int, float]]
"""(token id, logprob), most likely first."""

TOP_COUNT = 5
MAX_GAP_NATS = 0.35


@dataclass(frozen=True, slots=True)
class Comparison:
    label: str
    actual: Sequence[int]
    expected: Sequence[int]
    top: Callable[[int], Top]
    """The reference's most likely tokens at an index of `expected`, at least TOP_COUNT of them."""


def first_difference(actual: Sequence[int], expected: Sequence[int]) -> int | None:
    """The first index at which they differ, a missing token included; None when they are equal."""
    for index, (one, other) in enumerate(zip(actual, expected, strict=False)):
        if one != other:
            return index
    return None if len(actual) == len(expected) else min(len(actual), len(expected))


def is_near_tie(top: Top, one: int, other: int) -> bool:
    """Both among the reference's TOP_COUNT most likely tokens, and no more than MAX_GAP_NATS apart."""
    likely = dict(top[:TOP_COUNT])
    return one in likely and other in likely and abs(likely[one] - likely[other]) <= MAX_GAP_NATS


def assert_equal_but_for_near_ties(comparisons: Sequence[Comparison], *, min_equal: int) -> None:
    """At least `min_equal` comparisons are equal outright, and each of the others first differs in a near-tie."""
    num_equal = 0
    for comparison in comparisons:
        index = first_difference(comparison.actual, comparison.expected)
        if index is None:
            num_equal += 1
            continue
        assert index < min(len(comparison.actual), len(comparison.expected)), f"{comparison.label}: lengths differ"
        one, other, top = comparison.actual[index], comparison.expected[index], comparison.top(index)
        assert is_near_tie(top, one, other), f"{comparison.label}: token {index} is {one}, not {other}; likely: {top}"
    assert num_equal >= min_equal, f"{num_equal} of {len(comparisons)} are equal, {min_equal} must be"

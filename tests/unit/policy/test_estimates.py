import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.policy import estimates
from tailrace.policy.estimates import Crowding, PrefillFit


@given(st.floats(1e-6, 1e-2), st.floats(0, 1e-8), st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 9000))))
def test_a_fit_finds_both_coefficients_again(a: float, b: float, prefills: list[tuple[int, int]]) -> None:
    fit = PrefillFit()
    for cached, more in [(0, 100), (0, 8000), (512, 300), *prefills]:
        total = cached + more
        fit.add(cached, total, a * more + b * (total**2 - cached**2))
    assert fit.tokens_per_s == pytest.approx(1 / a, rel=1e-3)
    assert fit.curve_s == pytest.approx(b, rel=1e-3, abs=1e-6 * a)


def test_a_fit_of_one_length_has_a_rate_and_no_curve() -> None:
    fit = PrefillFit()
    assert (fit.tokens_per_s, fit.curve_s) == (0.0, 0.0)
    for _ in range(3):
        fit.add(0, 1000, 2.0)
    assert fit.tokens_per_s == pytest.approx(500.0)
    assert fit.curve_s == 0.0


def test_longer_prompts_that_are_cheaper_a_token_have_no_negative_curve() -> None:
    fit = PrefillFit()
    fit.add(0, 100, 1.0)
    fit.add(0, 10_000, 10.0)
    assert fit.curve_s == 0.0
    assert fit.tokens_per_s == pytest.approx(1 / ((0.98 * 0.01 + 0.001) / 1.98))


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_impossible_measurements_are_ignored(seconds: float) -> None:
    fit = PrefillFit()
    fit.add(0, 100, seconds)
    fit.add(100, 100, 1.0)
    assert fit.tokens_per_s == 0.0


def test_crowding_is_the_mean_number_that_waits_in_a_queue_of_equal_lengths() -> None:
    crowding = Crowding()
    assert crowding.waiting() == {}
    for second in range(20_000):
        crowding.add(f"p{second % 2}", 0.5 if second % 2 else 1.0, float(second), 2)
    waiting = crowding.waiting()
    # p0 is given 1 s every 2 s, p1 half of that; E[S^2] / 2 E[S]^2 of 1 and 0.5 is 0.5556.
    assert waiting["p0"] == pytest.approx(0.5556, rel=0.02)
    assert waiting["p1"] == pytest.approx(0.5556 / 3, rel=0.02)


def test_crowding_has_a_bound_and_a_memory() -> None:
    crowding = Crowding()
    for second in range(1000):
        crowding.add("p0", 100.0, float(second), 1)
    bound = 0.5 * estimates.MAX_BUSY / (1 - estimates.MAX_BUSY)
    assert crowding.waiting()["p0"] == pytest.approx(bound)
    for second in range(1000, 3000):
        crowding.add("p1", 0.001, float(second), 1)
    assert crowding.waiting().get("p0", 0.0) < 1e-3


def test_crowding_survives_a_long_life_and_workers_that_come_and_go() -> None:
    crowding = Crowding()
    for second in range(40_000):
        crowding.add(f"p{second // 10_000}", 0.5, float(second), 1)
    waiting = crowding.waiting()
    assert set(waiting) == {"p2", "p3"}, (
        "those that faded are dropped once there are more than twice as many as workers"
    )
    assert waiting["p2"] == pytest.approx(0.0, abs=1e-6)
    assert waiting["p3"] == pytest.approx(0.5)

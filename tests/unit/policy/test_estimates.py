import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.policy import estimates
from tailrace.policy.estimates import Crowding, PrefillFit, StepFit


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


@given(
    st.floats(1e-6, 1e-2),
    st.floats(0, 1e-8),
    st.lists(st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 900)), min_size=1, max_size=3), max_size=9),
)
def test_steps_of_several_chunks_are_fitted_too(a: float, b: float, steps: list[list[tuple[int, int]]]) -> None:
    fit = PrefillFit()
    for chunks in [[(0, 100)], [(0, 500), (5000, 100)], [(8000, 500)], *steps]:
        spans = [(start, start + more) for start, more in chunks]
        seconds = sum(a * (end - start) + b * (end**2 - start**2) for start, end in spans)
        fit.add_step(spans, seconds)
    assert fit.tokens_per_s == pytest.approx(1 / a, rel=1e-3)
    assert fit.curve_s == pytest.approx(b, rel=1e-3, abs=1e-6 * a)


def test_a_step_of_few_tokens_weighs_little() -> None:
    fit = PrefillFit()
    for _ in range(20):
        fit.add_step([(0, 500)], 0.5)
        fit.add_step([(500, 501)], 0.01)
    assert fit.tokens_per_s == pytest.approx(1000, rel=0.05)


def test_what_is_nearly_of_one_length_has_no_slope_made_of_noise() -> None:
    fit = PrefillFit(0.05, 0.05)
    for number in range(50):
        fit.add_step([(0, 500 + number % 7)], 0.5 * (1 + 0.2 * (number % 3)))
    assert fit.curve_s == 0.0


@given(st.floats(0, 0.1), st.floats(1e-6, 0.01), st.lists(st.integers(1, 64)))
def test_a_step_s_base_and_rows_are_found_again(base_s: float, row_s: float, batches: list[int]) -> None:
    fit = StepFit()
    for rows in (1, 16, 64, *batches):
        fit.add(rows, base_s + rows * row_s)
    assert fit.row_s == pytest.approx(row_s, rel=1e-3)
    assert fit.base_s == pytest.approx(base_s, rel=1e-3, abs=1e-4 * 64 * row_s)


def test_steps_of_one_batch_size_are_all_base() -> None:
    fit = StepFit()
    assert (fit.base_s, fit.row_s) == (0.0, 0.0)
    for _ in range(3):
        fit.add(8, 0.02)
    assert (fit.base_s, fit.row_s) == (pytest.approx(0.02), 0.0)


@pytest.mark.parametrize(("rows", "seconds"), [(0, 1.0), (4, 0.0), (4, math.nan), (4, math.inf)])
def test_impossible_steps_are_ignored(rows: int, seconds: float) -> None:
    fit = StepFit()
    fit.add(rows, seconds)
    assert (fit.base_s, fit.row_s) == (0.0, 0.0)


def test_a_prefill_fit_says_what_a_stretch_of_tokens_takes() -> None:
    fit = PrefillFit()
    assert fit.seconds(0, 1024) == 0.0
    for cached, prompt in ((0, 512), (512, 1024), (0, 2048)):
        fit.add(cached, prompt, 1e-3 * (prompt - cached) + 1e-7 * (prompt**2 - cached**2))
    assert fit.seconds(256, 768) == pytest.approx(1e-3 * 512 + 1e-7 * (768**2 - 256**2))


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0, 1e9])
def test_an_impossible_prefill_does_not_stay_in_the_sums(seconds: float) -> None:
    crowding = Crowding()
    for now_s in range(4):
        crowding.add("w", 0.5, float(now_s), 1)
    known = crowding.waiting()
    crowding.add("w", seconds, 3.0, 1)
    assert crowding.waiting() == known != {}

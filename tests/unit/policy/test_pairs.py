"""What a worker tells of the owners that it reads from, and what a router makes of it."""

from dataclasses import dataclass

import pytest

from tailrace.messages import OwnerRate
from tailrace.policy.pairs import MIN_SAMPLES, NO_PAIRS, STALE_S, PairRates, ToldRates


@dataclass
class Meter:
    bytes_per_s: float
    num_samples: int = MIN_SAMPLES
    used_s: float = 0.0


def told(rates: ToldRates) -> dict[str, float]:
    return {rate.owner_id: rate.bytes_per_s for rate in rates.rates}


def test_rates_are_told_in_steps_and_those_that_agree_to_one_are_equal() -> None:
    rates = ToldRates()
    rates.update({"a": Meter(1.02e9), "b": Meter(1.05e9), "slow": Meter(1e8)}, 0.0)
    said = told(rates)
    assert said["a"] == said["b"] == pytest.approx(1.05e9, rel=0.1)
    assert said["slow"] == pytest.approx(1e8, rel=0.1)


def test_noise_tells_nothing_new_and_a_change_does() -> None:
    rates, meter = ToldRates(), Meter(1e9)
    rates.update({"a": meter}, 0.0)
    first = rates.rates
    for rate in (1.05e9, 0.95e9, 1.1e9, 0.97e9):
        meter.bytes_per_s = rate
        rates.update({"a": meter}, 0.0)
        assert rates.rates is first
    meter.bytes_per_s = 5e8
    rates.update({"a": meter}, 0.0)
    assert told(rates)["a"] == pytest.approx(5e8, rel=0.1)


def test_a_pair_has_no_rate_before_some_samples_and_none_once_it_is_gone() -> None:
    rates = ToldRates()
    rates.update({"a": Meter(1e9, MIN_SAMPLES - 1)}, 0.0)
    assert rates.rates == ()
    rates.update({"a": Meter(1e9)}, 0.0)
    assert list(told(rates)) == ["a"]
    rates.update({}, 0.0)
    assert rates.rates == ()


def test_a_slow_pair_that_nobody_uses_is_forgotten_and_a_fast_one_is_not() -> None:
    rates = ToldRates()
    meters = {
        "a": Meter(4e9),
        "b": Meter(4e9),
        "slower": Meter(2e9),
        "slow": Meter(1e8),
        "busy": Meter(1e8, used_s=9.0),
    }
    rates.update(meters, STALE_S - 1)
    assert list(told(rates)) == ["a", "b", "slower", "slow", "busy"]
    rates.update(meters, STALE_S)
    assert list(told(rates)) == ["a", "b", "slower", "busy"]


@pytest.mark.parametrize(("usual", "unused"), [(4e9, 2e9), (1e8, 5e8)], ids=["slower than the others", "than neutral"])
def test_what_is_slow_by_either_measure_is_forgotten(usual: float, unused: float) -> None:
    rates = ToldRates()
    used = {name: Meter(usual, used_s=STALE_S) for name in "abc"}
    rates.update({**used, "unused": Meter(unused)}, STALE_S)
    assert list(told(rates)) == ["a", "b", "c"]


def test_the_median_stands_in_for_owners_that_are_not_measured() -> None:
    pairs = PairRates.of([OwnerRate("a", 1e9), OwnerRate("b", 1e9), OwnerRate("slow", 1e8), OwnerRate("fast", 5e9)])
    assert pairs == PairRates(1e9, {"slow": 1e8, "fast": 5e9}, 5e9)


def test_impossible_rates_are_left_out() -> None:
    odd = [OwnerRate(str(rate), rate) for rate in (0.0, -1.0, float("nan"), float("inf"))]
    assert PairRates.of(odd) == NO_PAIRS
    assert PairRates.of([*odd, OwnerRate("a", 2e9)]) == PairRates(2e9, {}, 2e9)

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.kv.events import Tier
from tailrace.messages import OwnerRate
from tailrace.policy import fetching
from tailrace.policy.fetching import BARRED_S, MAX_BARRED_S, NEUTRAL_WAYS, STALE_S, FetchRates
from tailrace.policy.routing import Held, Way


def test_before_any_fetch_neutral_ways_stand_in() -> None:
    rates = FetchRates()
    assert {tier: rates.way("h", "n", tier) for tier in Tier} == NEUTRAL_WAYS


@given(st.floats(1e-4, 0.05), st.floats(1e-11, 1e-7))
def test_a_pair_s_fixed_cost_and_rate_are_found_again(overhead_s: float, s_per_byte: float) -> None:
    rates = FetchRates()
    for num_bytes in (10**5, 10**7, 10**6, 10**8, 10**5, 5 * 10**7):
        rates.succeeded("h", "n", Tier.WORKER, num_bytes, overhead_s + num_bytes * s_per_byte)
    way = rates.way("h", "n", Tier.WORKER)
    assert way is not None
    assert way.s_per_byte == pytest.approx(s_per_byte, rel=1e-3)
    assert way.overhead_s == pytest.approx(overhead_s, rel=0.05, abs=1e-3 * 10**8 * s_per_byte)


def test_fetches_of_one_length_are_predicted_as_they_were() -> None:
    rates = FetchRates()
    for _ in range(3):
        rates.succeeded("h", "n", Tier.WORKER, 10**6, 0.02)
    way = rates.way("h", "n", Tier.WORKER)
    assert way is not None
    assert way.overhead_s == NEUTRAL_WAYS[Tier.WORKER].overhead_s
    assert way.overhead_s + 10**6 * way.s_per_byte == pytest.approx(0.02)
    rates.succeeded("h", "m", Tier.WORKER, 10**6, 0.002)
    short = rates.way("h", "m", Tier.WORKER)
    assert short is not None
    assert short.overhead_s + 10**6 * short.s_per_byte == pytest.approx(0.002)


def test_what_is_not_measured_is_as_fast_as_the_best_of_its_kind() -> None:
    rates = FetchRates()
    rates.succeeded("a", "n", Tier.CPU, 10**6, 0.0008)
    rates.succeeded("b", "n", Tier.CPU, 10**6, 0.0004)
    assert rates.way("c", "n", Tier.CPU) == rates.way("b", "n", Tier.CPU) != rates.way("a", "n", Tier.CPU)
    assert rates.way("c", "n", Tier.NVME) == NEUTRAL_WAYS[Tier.NVME]
    # The best gets slow: it is the best no more.
    for _ in range(60):
        rates.succeeded("b", "n", Tier.CPU, 10**6, 9.0)
    assert rates.way("c", "n", Tier.CPU) == rates.way("a", "n", Tier.CPU)


def test_a_slow_first_fetch_is_not_the_last_one() -> None:
    """Nobody would measure again what nobody chooses."""
    rates = FetchRates()
    rates.advance(100.0)
    for _ in range(2):
        rates.succeeded("a", "n", Tier.WORKER, 10**6, 5.0)
    slow, usual = rates.way("a", "n", Tier.WORKER), NEUTRAL_WAYS[Tier.WORKER]
    assert slow is not None
    assert slow.s_per_byte > 1e-6
    assert rates.way("b", "n", Tier.WORKER) == usual, "the others are not blamed"
    rates.advance(100.0 + STALE_S - 1)
    assert rates.way("a", "n", Tier.WORKER) == slow
    rates.advance(100.0 + STALE_S)
    assert rates.way("a", "n", Tier.WORKER) == usual
    rates.succeeded("a", "n", Tier.WORKER, 10**6, 0.001)
    again = rates.way("a", "n", Tier.WORKER)
    assert again is not None
    assert again.s_per_byte < 1e-9, "what was measured long ago does not count"


def test_a_fast_pair_keeps_its_rate_however_long_it_is_not_used() -> None:
    rates = FetchRates()
    for holder, seconds in (("a", 0.0008), ("b", 0.0004)):
        rates.succeeded(holder, "n", Tier.CPU, 10**6, seconds)
    fast = rates.way("a", "n", Tier.CPU)
    rates.advance(9 * STALE_S)
    assert rates.way("a", "n", Tier.CPU) == fast != rates.way("b", "n", Tier.CPU)


def test_a_fetch_that_ends_well_after_another_has_failed_opens_the_way_again() -> None:
    rates = FetchRates()
    rates.failed("h", "n", 0.0)
    assert rates.way("h", "n", Tier.WORKER) is None
    rates.succeeded("h", "n", Tier.WORKER, 10**6, 0.002)
    assert rates.way("h", "n", Tier.WORKER) is not None


@pytest.mark.parametrize("is_known", [False, True])
def test_a_fetch_that_is_late_alone_is_not_counted(is_known: bool) -> None:
    """Its holder was busy."""
    rates = FetchRates()
    for _ in range(3 if is_known else 0):
        rates.succeeded("h", "n", Tier.WORKER, 10**6, 0.004)
    usual = rates.way("h", "n", Tier.WORKER)
    for _ in range(2):
        rates.succeeded("h", "n", Tier.WORKER, 10**6, 3.0)
        assert rates.way("h", "n", Tier.WORKER) == usual
        for _ in range(fetching.NUM_BEFORE):
            rates.succeeded("h", "n", Tier.WORKER, 10**6, 0.004)
        usual = rates.way("h", "n", Tier.WORKER)
    rates.succeeded("h", "n", Tier.WORKER, 10**6, 3.0)
    rates.succeeded("h", "n", Tier.WORKER, 10**6, 0.004)
    rates.succeeded("h", "n", Tier.WORKER, 10**6, 3.0)
    way = rates.way("h", "n", Tier.WORKER)
    assert way is not None
    assert way.overhead_s + 10**6 * way.s_per_byte > 0.25, "it is often late"


def test_what_is_not_fetched_yet_goes_by_what_its_needer_says_of_the_link() -> None:
    rates = FetchRates()
    rates.told("n", [OwnerRate("h", 2e8), OwnerRate("fast", 4e9), OwnerRate("odd", float("nan"))])
    assert rates.way("h", "n", Tier.WORKER) == Way(0.005, 1 / 2e8)
    assert rates.way("fast", "n", Tier.CPU) == Way(0.005, 1 / 4e9)
    assert [
        rates.way(*pair) for pair in (("odd", "n", Tier.WORKER), ("h", "m", Tier.WORKER), ("h", "n", Tier.NVME))
    ] == [NEUTRAL_WAYS[tier] for tier in (Tier.WORKER, Tier.WORKER, Tier.NVME)]
    rates.succeeded("h", "n", Tier.WORKER, 10**6, 0.010)
    way = rates.way("h", "n", Tier.WORKER)
    assert way is not None
    assert way.overhead_s + 10**6 * way.s_per_byte == pytest.approx(0.010), "a fetch says more than its link"
    rates.told("n", [])
    assert rates.way("fast", "n", Tier.CPU) == NEUTRAL_WAYS[Tier.CPU]


def test_only_so_many_needers_rates_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "MAX_NEEDERS", 2)
    rates = FetchRates()
    for needer in ("a", "b", "a", "c"):
        rates.told(needer, [OwnerRate("h", 5e9)])
    known = [rates.way("h", needer, Tier.WORKER) != NEUTRAL_WAYS[Tier.WORKER] for needer in ("a", "b", "c")]
    assert known == [True, False, True]


def test_a_pair_forgets() -> None:
    rates = FetchRates()
    rates.succeeded("h", "n", Tier.WORKER, 10**6, 1.0)
    for _ in range(60):
        rates.succeeded("h", "n", Tier.WORKER, 10**6, 0.01)
    way = rates.way("h", "n", Tier.WORKER)
    assert way is not None
    assert way.overhead_s + 10**6 * way.s_per_byte == pytest.approx(0.01, rel=0.3)


def test_a_pair_that_fails_again_and_again_is_left_alone_for_longer_and_longer_and_recovers() -> None:
    rates = FetchRates()
    now_s, pauses = 0.0, []
    for _ in range(9):
        rates.failed("h", "n", now_s)
        began_s = now_s
        while rates.way("h", "n", Tier.WORKER) is None:
            now_s += 0.5
            rates.advance(now_s)
        pauses.append(now_s - began_s)
        assert rates.way("other", "n", Tier.WORKER) is not None
    assert pauses == [BARRED_S * 2**n for n in range(6)] + [MAX_BARRED_S] * 3
    rates.succeeded("h", "n", Tier.WORKER, 10**6, 0.01)
    rates.failed("h", "n", now_s)
    rates.advance(now_s + BARRED_S)
    assert rates.way("h", "n", Tier.WORKER) is not None


def test_failures_of_fetches_that_were_under_way_together_count_once() -> None:
    rates = FetchRates()
    for _ in range(5):
        rates.failed("h", "n", 0.0)
    rates.advance(BARRED_S)
    assert rates.way("h", "n", Tier.WORKER) is not None


@pytest.mark.parametrize(("num_bytes", "seconds"), [(0, 1.0), (-1, 1.0), (10, 0.0), (10, float("nan")), (10, -1.0)])
def test_impossible_measurements_are_ignored(num_bytes: int, seconds: float) -> None:
    rates = FetchRates()
    rates.succeeded("h", "n", Tier.WORKER, num_bytes, seconds)
    assert rates.way("h", "n", Tier.WORKER) == NEUTRAL_WAYS[Tier.WORKER]


def test_pairs_are_bounded_and_the_best_is_not_one_that_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "MAX_PAIRS", 3)
    rates = FetchRates()
    rates.succeeded("fastest", "n", Tier.WORKER, 10**6, 0.0001)
    for number in range(5):
        rates.succeeded(f"h{number}", "n", Tier.WORKER, 10**6, 0.0005 + number / 10_000)
        rates.failed(f"g{number}", "n", 0.0)
    assert (len(rates._pairs), len(rates._failing), len(rates._barred)) == (3, 3, 3)
    assert rates.way("fastest", "n", Tier.WORKER) == rates.way("h2", "n", Tier.WORKER)


def test_the_disk_s_blocks_of_a_range_are_its_last() -> None:
    held = Held("s", 50, is_store=True, on_disk=20)
    assert [held.on_disk_of(*span) for span in ((0, 50), (0, 30), (10, 35), (40, 50), (45, 48))] == [20, 0, 5, 10, 3]

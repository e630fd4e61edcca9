import pytest

from tailrace.cli.bench.report import Percentiles, Spread, header, percentile


@pytest.mark.parametrize(
    ("share", "value"), [(0.0, 1), (0.01, 1), (0.5, 50), (0.501, 51), (0.9, 90), (0.99, 99), (1.0, 100)]
)
def test_a_percentile_is_the_nearest_rank(share, value):
    assert percentile(range(100, 0, -1), share) == value


def test_a_percentile_of_few_values_is_one_of_them():
    assert percentile([7.0], 0.99) == 7.0
    assert percentile([2.0, 1.0], 0.5) == 1.0
    assert percentile([2.0, 1.0], 0.99) == 2.0


def test_no_values_have_no_percentile_but_a_report_without_times_can_be_written():
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)
    assert Percentiles.of([]) == Percentiles(0.0, 0.0, 0.0)


def test_a_spread_is_median_and_ends_and_seconds_become_milliseconds():
    assert Spread.of_ms([0.003, 0.001, 0.010]) == Spread(3.0, 1.0, 10.0)
    assert str(Spread.of([3.0, 1.0, 10.0, 5.0])) == "4.0 (1.0-10.0)"


def test_the_header_says_what_ran_where():
    head = header("x", packages=("pytest", "no-such-package"))
    assert head["benchmark"] == "x"
    assert head["versions"] == {"pytest": pytest.__version__, "no-such-package": "not installed"}
    assert set(head["machine"]) == {"processor", "cores", "python", "load_before"}

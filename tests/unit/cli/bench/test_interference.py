from tailrace.cli.bench.interference import ArmGaps, InterferenceOptions, arm_configs, arrivals, gaps_between, report
from tailrace.config import UpConfig


def test_a_gap_belongs_to_the_time_in_which_it_ends():
    assert gaps_between([0.0, 1.0, 3.0, 4.0, 9.0], 2.0, 5.0) == [2.0, 1.0]
    assert gaps_between([0.0], 0.0, 9.0) == []


def test_arrivals_are_the_same_for_one_seed_and_begin_at_once():
    times = arrivals(2.0, 100.0, seed=3)
    assert times == arrivals(2.0, 100.0, seed=3) != arrivals(2.0, 100.0, seed=4)
    assert times[0] == 0.0
    assert times == sorted(times)
    assert times[-1] < 100.0
    assert 150 < len(times) < 260


def test_the_arms_differ_only_in_who_prefills_and_in_chunks():
    configs = arm_configs(UpConfig(max_num_batched_tokens=256))
    shape = {arm: (c.prefill, c.decode, c.max_num_batched_tokens) for arm, c in configs.items()}
    assert shape == {"unchunked": (0, 2, 1 << 16), "chunked": (0, 2, 256), "pd": (1, 1, 256)}
    assert all(c.threads == 1 and not c.prefix_caching for c in configs.values())


def test_ratios_are_of_the_p99_of_all_rounds_together():
    steady = [0.02] * 98
    arms = {
        "unchunked": ArmGaps([[*steady, 0.6, 0.8], [*steady, 0.6, 0.6]], [1.0]),
        "chunked": ArmGaps([[*steady, 0.3, 0.3]], [1.0]),
        "pd": ArmGaps([[*steady, 0.1, 0.1]], []),
    }
    result = report({}, InterferenceOptions(), UpConfig(), arms)
    assert result["icl_p99_unchunked_over_pd"] == 6.0
    assert result["icl_p99_chunked_over_pd"] == 3.0
    assert result["unchunked"]["icl_p99_ms_of_rounds"] == [600.0, 600.0]
    assert (result["unchunked"]["icl_max_ms"], result["unchunked"]["num_gaps"]) == (800.0, 200)
    assert result["pd"]["prompt_ttft_ms"] is None

from tailrace.cli.bench.load import RequestTimes
from tailrace.cli.bench.overhead import OverheadOptions, Turns, report


def test_the_ratio_is_the_median_of_rounds():
    requests = [RequestTimes(0.0, chunks_at=[0.1, 0.2], ended_at=0.2, output_tokens=2)]
    result = report({}, OverheadOptions(), Turns([100.0, 200.0, 100.0], [90.0, 190.0, 99.0], requests=requests))
    assert result["server_over_engine"] == {"median": 0.95, "min": 0.9, "max": 0.99}
    assert result["engine_output_tokens_per_s"]["median"] == 100.0
    assert result["ttft_ms"]["p50"] == 100.0

import pytest
from typer.testing import CliRunner

from tailrace.cli.bench.load import RequestTimes
from tailrace.cli.bench.serve import ServeOptions, Slo, summarize
from tailrace.cli.main import app
from tailrace.errors import ConfigError


def request(ttft=0.1, gaps=(0.02, 0.02), error=""):
    chunks = [1 + ttft]
    for gap in gaps:
        chunks.append(chunks[-1] + gap)
    return RequestTimes(1.0, chunks, chunks[-1], prompt_tokens=100, output_tokens=len(chunks), error=error)


def test_rates_count_whole_requests_and_errors_are_told_by_message():
    result = summarize([request(), request(), request(error="full"), request(error="full")], 2.0, Slo())
    assert (result["num_ok"], result["errors"]) == (2, {"full": 2})
    assert result["requests_per_s"] == 1.0
    assert (result["output_tokens"], result["output_tokens_per_s"], result["prompt_tokens_per_s"]) == (6, 3.0, 100.0)
    assert result["goodput_requests_per_s"] is None


def test_percentiles_are_over_requests_for_ttft_and_over_chunks_for_icl():
    result = summarize([request(ttft=t, gaps=(0.01, 0.01, 0.09)) for t in (0.1, 0.2, 0.3)], 1.0, Slo())
    assert result["ttft_ms"] == {"p50": 200.0, "p90": 300.0, "p99": 300.0}
    assert result["icl_ms"] == {"p50": 10.0, "p90": 90.0, "p99": 90.0}
    assert result["tpot_ms"]["p50"] == pytest.approx(36.67)


@pytest.mark.parametrize(
    ("slo", "goodput"),
    [
        (Slo(ttft_ms=150), 1.0),
        (Slo(ttft_ms=1000), 2.0),
        (Slo(tpot_ms=25), 1.0),
        (Slo(icl_ms=30), 1.0),
        (Slo(ttft_ms=1000, tpot_ms=1000, icl_ms=1), 0.0),
    ],
)
def test_goodput_meets_all_slos(slo, goodput):
    requests = [request(ttft=0.1, gaps=(0.02,)), request(ttft=0.3, gaps=(0.04,)), request(error="lost")]
    assert summarize(requests, 1.0, slo)["goodput_requests_per_s"] == goodput


def test_a_run_of_errors_is_a_report_too():
    result = summarize([request(error="down")], 1.0, Slo(ttft_ms=1))
    assert (result["num_ok"], result["output_tokens_per_s"], result["ttft_ms"]["p99"]) == (0, 0.0, 0.0)


@pytest.mark.parametrize("both", [{}, {"concurrency": 1, "request_rate": 1.0}])
def test_load_has_one_shape(both):
    with pytest.raises(ConfigError, match="one of concurrency and request_rate"):
        ServeOptions(**both)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--url", "http://x/v1", "--decode", "2", "--concurrency", "1"), 2, "not both"),
        ((), 2, "one of concurrency and request_rate"),
        (("--concurrency", "0"), 2, "--concurrency"),
        (("--url", "http://127.0.0.1:9/v1", "--concurrency", "1"), 1, "http://127.0.0.1:9/v1/models"),
        (("--concurrency", "1", "--dtype", "int3"), 2, "dtype"),
    ],
)
def test_a_wrong_argument_is_said(arguments, code, message, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    done = CliRunner().invoke(app, ["bench", "serve", *arguments])
    assert done.exit_code == code
    assert message in done.stderr

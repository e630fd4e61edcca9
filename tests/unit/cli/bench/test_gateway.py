import json
import os

import psutil
import pytest
from typer.testing import CliRunner

from tailrace.cli.bench.fake_worker import FakeDecode
from tailrace.cli.bench.gateway import count_tokens, cpu_seconds
from tailrace.cli.bench.load import RequestTimes
from tailrace.cli.main import app
from tailrace.errors import UnavailableError
from tailrace.messages import Submission
from tailrace.types import FinishReason, SamplingParams
from tailrace.worker.attach import Leg
from tests.helpers.tiny_model import make_tiny_model


def leg(leg_id, max_tokens):
    tokens = [1, 2, 3]
    sampling = SamplingParams(max_tokens=max_tokens)
    return Leg(leg_id, None, Submission(leg_id, "r", 0, tokens, 3, sampling, (0,), 0, 60.0), 0.0)


def test_the_fake_worker_gives_each_stream_a_token_a_step_and_ends_it():
    worker = FakeDecode([7, 8], 50.0)
    worker.begin(leg(1, 2))
    worker.begin(leg(2, 3))
    first, second, third, fourth = (worker.step() for _ in range(4))
    assert (first.tokens.handles, first.tokens.positions, first.tokens.token_ids) == ([1, 2], [3, 3], [7, 8])
    assert [(f.handle, f.reason) for f in second.finished] == [(1, FinishReason.LENGTH)]
    assert (second.ended, [r.handle for r in second.reports]) == ([1], [1])
    assert (third.tokens.handles, third.tokens.positions) == ([2], [5])
    assert (fourth.tokens.handles, fourth.load.num_running) == ([], 0)


def test_a_cancelled_stream_gets_nothing():
    worker = FakeDecode([7], 50.0)
    gone = leg(1, 9)
    worker.begin(gone)
    worker.cancel(gone, ())
    worker.cancel(gone, ())
    assert worker.step().tokens.handles == []


def test_tokens_are_counted_only_when_all_came():
    whole = RequestTimes(0.0, output_tokens=5)
    assert count_tokens([whole, whole], 5) == 10
    for wrong in (RequestTimes(0.0, output_tokens=4), RequestTimes(0.0, output_tokens=5, error="cut")):
        with pytest.raises(UnavailableError):
            count_tokens([whole, wrong], 5)


def test_cpu_seconds_of_a_process_go_up_with_its_work_as_the_system_counts_it():
    process = psutil.Process(os.getpid())
    before = cpu_seconds(process.pid)
    while cpu_seconds(process.pid) - before < 0.02:
        sum(range(10_000))
    times = process.cpu_times()
    assert cpu_seconds(process.pid) == pytest.approx(times.user + times.system, abs=0.05)


@pytest.mark.e2e
def test_the_command_measures_both_with_the_same_tokens(tmp_path):
    model = str(make_tiny_model(tmp_path / "m"))
    arguments = ("--streams", "4", "--tokens-per-s", "50", "--seconds", "0.5", "--rounds", "2", "--json")
    done = CliRunner().invoke(app, ["bench", "gateway", "--model", model, *arguments])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["options"]["streams"] == 4
    for arm in ("gateway", "plain"):
        assert 50 < result[arm]["tokens_per_s"]["median"] < 220
        assert result[arm]["icl_ms"]["p50"] > 5
        assert 0.5 < result[arm]["chunks_per_token"]["median"] <= 1

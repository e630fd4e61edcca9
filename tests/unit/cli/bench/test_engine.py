import json

import pytest
from typer.testing import CliRunner

from tailrace.checkpoint.model_config import load_model_config
from tailrace.cli.bench.engine import ModelCosts, describe_steps, summarize
from tailrace.cli.bench.engine_loop import EngineLoop, LoopOptions, ModelClock, RunTimes, StepTimes, random_prompts
from tailrace.cli.bench.probes import MachineLimits, measure_limits
from tailrace.cli.bench.scheduler_load import time_scheduler
from tailrace.cli.main import app
from tests.helpers.tiny_model import make_tiny_model


def step(**values):
    names = StepTimes.__dataclass_fields__.keys() - {"phases_s"}
    return StepTimes(**{name: values.get(name, 0) for name in names})


PREFILL = step(prompt_tokens=100, attended_tokens=5050, run_s=2.0, model_s=2.0)
MIXED = step(prompt_tokens=50, num_decode=1, run_s=1.0, model_s=1.0)
DECODE = step(num_decode=2, context_tokens=200, schedule_s=0.1, run_s=0.8, model_s=0.5, finish_s=0.1)
COSTS = ModelCosts(weight_bytes=600, kv_bytes_per_token=2, flops_per_token=10, flops_per_attended=4)


def test_definitions_of_every_rate():
    slow = RunTimes(output_tokens=10, wall_s=5.0, steps=[PREFILL, MIXED, DECODE])
    fast = RunTimes(output_tokens=10, wall_s=2.0, steps=[PREFILL, DECODE])
    result = summarize([slow, fast, slow], COSTS, MachineLimits(stream_bytes_per_s=2000, gemm_flops_per_s=21200))
    assert result["output_tokens_per_s"] == 5.0
    assert result["all_runs_output_tokens_per_s"] == [2.0, 5.0, 2.0]
    assert result["prefill_tokens_per_s"] == 50.0
    assert result["decode_tokens_per_s"] == 2.0
    assert result["mbu_decode"] == (600 + 200 * 2) / 1.0 / 2000
    assert result["mfu_prefill"] == (100 * 10 + 5050 * 4) / 2.0 / 21200
    assert result["decode_step"]["count"] == 3


def test_host_overhead_is_what_is_not_the_model():
    said = describe_steps([DECODE])
    assert (said["host_overhead"], said["host_overhead_ms"], said["scheduler_us"]) == (0.5, 500.0, 200000.0)
    assert describe_steps([]) == {"count": 0}


def test_what_a_step_must_read_and_compute(tmp_path):
    config = load_model_config(make_tiny_model(tmp_path / "m"))
    costs = ModelCosts.of(config, "float32", 512)
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128
    assert costs.weight_bytes == (2 * layer + config.vocab_size * 64) * 4
    assert ModelCosts.of(config, "float32", 512, quantization="int8").weight_bytes * 4 == costs.weight_bytes
    assert costs.flops_per_token == 2 * 2 * layer
    assert costs.flops_per_attended == 2 * 2 * 2 * 64


def test_the_loop_counts_every_token_and_leaves_nothing_behind(tmp_path):
    loop = EngineLoop(
        LoopOptions(make_tiny_model(tmp_path / "m"), max_batch=3, max_tokens=30, max_num_batched_tokens=32)
    )
    prompts = random_prompts(3, 20, loop.engine.config.vocab_size)
    for _ in range(2):
        times = loop.generate(prompts, 10)
        assert [len(tokens) for tokens in times.tokens] == [10, 10, 10]
        assert times.output_tokens == 30
        assert sum(s.prompt_tokens for s in times.steps) == 60
        assert sum(s.attended_tokens for s in times.steps) == 3 * 20 * 21 // 2
        assert all(0 < s.model_s < s.run_s for s in times.steps)
        assert sum(s.step_s for s in times.steps) <= times.wall_s
    assert loop._scheduler.sequences() == []


def test_the_clock_stands_in_for_methods_and_counts_failures_too():
    class Model:
        def forward(self, x):
            return 1 / x

        def logits(self, *, y):
            return y

    model = Model()
    clock = ModelClock(model)
    assert (model.forward(2), model.logits(y=3)) == (0.5, 3)
    assert clock.take() > 0
    assert clock.take() == 0
    with pytest.raises(ZeroDivisionError):
        model.forward(0)
    assert clock.take() > 0


def test_prompts_differ_and_fit_the_vocabulary():
    prompts = random_prompts(8, 16, 300)
    assert len({tuple(p) for p in prompts}) == 8
    assert all(0 <= token < 300 for prompt in prompts for token in prompt)
    assert min(min(p) for p in random_prompts(8, 64, 49152)) >= 1000


def test_a_step_of_many_sequences_takes_time():
    times = time_scheduler(32, num_steps=20)
    assert len(times) == 20
    assert all(0 < t < 0.1 for t in times)


def test_limits_are_rates():
    limits = measure_limits(num_bytes=1 << 20)
    assert limits.stream_bytes_per_s > 1e8
    assert limits.gemm_flops_per_s > 1e8
    assert MachineLimits(1.0, 5.0).or_better(MachineLimits(2.0, 3.0)) == MachineLimits(2.0, 5.0)


def test_the_command_prints_one_json_object(tmp_path):
    model = str(make_tiny_model(tmp_path / "m"))
    done = CliRunner().invoke(
        app, ["bench", "engine", "--model", model, "--batch", "2", "--input", "40", "--output", "4", "--json"]
    )
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (result["benchmark"], result["options"]["batch"]) == ("engine", 2)
    assert len(result["all_runs_output_tokens_per_s"]) == 3
    assert result["output_tokens_per_s"] == max(result["all_runs_output_tokens_per_s"])
    assert result["decode_step"]["count"] == 9
    for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "mbu_decode", "mfu_prefill"):
        assert result[name] > 0


def test_phases_add_up_to_the_model_and_only_where_they_are_asked_for(tmp_path):
    loop = EngineLoop(LoopOptions(make_tiny_model(tmp_path / "m"), max_batch=2, max_tokens=30))
    prompts = random_prompts(2, 20, loop.engine.config.vocab_size)
    assert all(s.phases_s == {} for s in loop.generate(prompts, 4).steps)
    loop.time_phases()
    times = loop.generate(prompts, 4)
    assert all(0 < sum(s.phases_s.values()) < s.model_s for s in times.steps)
    assert set(describe_steps(times.steps)["phases_ms"]) >= {"attention", "gate_up", "head"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "float16", "--phases"), "phases: only the compiled kernels time them"),
        (("--input", "2047", "--output", "2"), "input + output: at most 2048 tokens"),
        (("--dtype", "int3"), "dtype must be one of auto"),
        (("--load-format", "gguf"), "load_format must be one of auto, dummy"),
        (("--batch", "0"), "--batch"),
        (("--threads", "0"), "--threads"),
    ],
)
def test_a_wrong_argument_is_exit_code_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    done = CliRunner().invoke(app, ["bench", "engine", "--model", str(make_tiny_model(tmp_path / "m")), *arguments])
    assert done.exit_code == 2
    assert message in done.stderr

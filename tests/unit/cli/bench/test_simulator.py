import asyncio
import dataclasses
import json
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from tailrace.cli.bench.load import Asker, RequestTimes
from tailrace.cli.bench.replay import EXPLAIN, Figures, Served, TokenBlocks, compared, replay
from tailrace.cli.bench.simulated_replays import CALIBRATION, WARM_UP, Case, Replay, joined, simulate
from tailrace.cli.bench.simulator import SimulatorBenchOptions, _agreement, calibration, cases, summarize
from tailrace.cli.main import app
from tailrace.config import UpConfig
from tailrace.errors import ConfigError, UnavailableError
from tailrace.sim.profile import PROFILES
from tailrace.sim.simulator import Pace, RequestRecord, SimOptions, Simulator
from tailrace.sim.workload import SimRequest, Workload, block_name

BLOCK = 16


def make_workload(*prompts: tuple[int, ...], tokens: int = 40, output: int = 1, gap_s: float = 0.01) -> Workload:
    return Workload(
        [SimRequest(gap_s * i, tokens, output, tuple(map(block_name, blocks))) for i, blocks in enumerate(prompts)],
        BLOCK,
    )


def make_served(
    ttft_s: float = 1.0, *, hit: int = 0, worker: int = 0, prefill_s: float = 0.5, tpot_s: float = 0.0, output: int = 1
) -> Served:
    return Served(100, hit, 0, ttft_s, prefill_s, worker, ttft_s + (output - 1) * tpot_s, output)


def test_equal_names_are_equal_tokens_and_nothing_else_is():
    workload = make_workload((1, 2, 3), (1, 2, 4), (5, 2, 3))
    blocks = TokenBlocks(workload, 49_152, "a")
    first, second, third = (blocks.prompt(i, request) for i, request in enumerate(workload.requests))
    assert [len(tokens) for tokens in (first, second, third)] == [40, 40, 40]
    assert first[:32] == second[:32]
    assert first[32:] != second[32:], "what has no full block shares nothing"
    assert first[16:32] == third[16:32]
    assert first[:16] != third[:16]
    assert all(1000 <= token < 49_152 for token in first)
    assert TokenBlocks(workload, 49_152, "b").prompt(0, workload.requests[0])[:16] != first[:16]


def test_figures_and_their_errors():
    real = Figures.of([make_served(1.0, hit=50), make_served(3.0, worker=1, prefill_s=1.5)], 2)
    assert (real.hit_rate, real.ttft_mean_s, real.ttft_p50_s, real.ttft_p99_s) == (0.25, 2.0, 1.0, 3.0)
    assert (real.imbalance, real.prefill_mean_s) == (1.5, 1.0)
    said = Figures.of([make_served(1.5, hit=60), make_served(3.0, prefill_s=1.5)], 2)
    decoded = [make_served(tpot_s=tpot_s, output=11) for tpot_s in (0.01, 0.02, 0.06)]
    found = Figures.of([*decoded, make_served()], 2)
    assert (found.tpot_mean_s, found.tpot_p50_s, found.tpot_p99_s) == pytest.approx((0.03, 0.02, 0.06))
    assert found.latency_mean_s == pytest.approx(1.0 + 10 * 0.09 / 4)
    assert (real.tpot_mean_s, real.latency_mean_s) == (0.0, 2.0)
    errors = compared(real, said)
    assert errors["hit_rate"] == pytest.approx(0.05)
    assert errors["ttft_mean_s"] == pytest.approx(0.125)
    assert errors["imbalance"] == pytest.approx(2.0 / 1.5 - 1.0)


def test_a_simulated_worker_and_a_real_one_are_matched_by_number():
    record = RequestRecord(SimRequest(1.0, 100, 3, ()), "p1", prefill_s=0.2, first_token_s=1.5, finished_s=1.7)
    assert Served.simulated(record) == Served(100, 0, 0, 0.5, 0.2, 1, pytest.approx(0.7), 3)
    local = RequestRecord(SimRequest(1.0, 100, 3, ()), "d0", is_local=True)
    assert Served.simulated(local).worker == -1
    real = [make_served(worker=worker) for worker in (0, 1, 0, -1)]
    simulated = [make_served(worker=worker) for worker in (1, 0, 1, 0)]
    assert _agreement(real, simulated, 2) == 0.75


def _answer(request: httpx.Request) -> httpx.Response:
    body = json.loads(request.content)
    assert request.headers["x-tailrace-explain"] == "1"
    assert body["max_tokens"] == 3
    usage = {
        "prompt_tokens": len(body["prompt"]),
        "completion_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 32},
        "tailrace": {"prefill_ms": 12.5, "cached_tokens_by_tier": {"worker": 16, "peer": 16}},
    }
    events = [{"choices": [{"text": "a"}]}, {"choices": [], "usage": usage}]
    chosen = json.dumps([{"chosen": {"prefill_id": "prefill-1", "decode_id": "decode-0"}}])
    text = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    return httpx.Response(200, text=text, headers={"X-Tailrace-Explain": chosen})


def test_a_replay_says_what_became_of_each_request():
    workload = make_workload((1, 2), (1, 3), output=3)

    async def run() -> list[Served]:
        async with Asker("http://test/v1", transport=httpx.MockTransport(_answer), headers=EXPLAIN) as asker:
            return await replay(asker, "m", workload, TokenBlocks(workload, 49_152, ""))

    served = asyncio.run(run())
    assert [(one.prompt_tokens, one.hit_tokens, one.fetched_tokens, one.worker) for one in served] == [
        (40, 16, 16, 1)
    ] * 2
    assert all(one.prefill_s == 0.0125 and one.latency_s >= one.ttft_s > 0.0 for one in served)
    assert [one.output_tokens for one in served] == [3, 3]


def test_a_failed_request_fails_the_benchmark():
    with pytest.raises(UnavailableError, match="HTTP 503"):
        Served.answered(RequestTimes(0.0, error="HTTP 503: no"))


def test_cases_are_in_the_workers_blocks(tmp_path: Path):
    options = SimulatorBenchOptions(num_requests=10, seeds=2)
    found = list(cases(options, BLOCK))
    assert [(case.name, case.seed) for case in found] == [
        ("shared-prefix", 0),
        ("shared-prefix", 1),
        ("chat", 0),
        ("chat", 1),
    ]
    assert all(case.workload.block_tokens == BLOCK for case in found)
    trace = tmp_path / "t.jsonl"
    lines = [{"timestamp": i, "input_length": 1000, "output_length": 5, "hash_ids": [0, 1 + i]} for i in range(20)]
    trace.write_text("\n".join(map(json.dumps, lines)))
    first, second = cases(SimulatorBenchOptions(trace=trace, num_requests=10, seeds=2), BLOCK)
    assert first.workload.requests[0].num_prompt_tokens == 16 + 488 * 16 // 512
    assert second.workload.requests[0].hashes[1] == block_name(11)
    with pytest.raises(ConfigError, match="trace: has 20 requests, 30 are needed"):
        list(cases(SimulatorBenchOptions(trace=trace, num_requests=10, seeds=3), BLOCK))


def test_replays_of_a_cluster_are_one_workload_in_which_they_share_nothing():
    workload = make_workload((1, 2), (1, 3))
    replays = [Replay(Case("a", n, workload), "cost", 100.0 + 20 * n, ()) for n in range(2)]
    whole = joined(replays)
    assert [request.arrival_s for request in whole.requests] == pytest.approx([0.0, 0.01, 20.0, 20.01])
    first, second, third, fourth = (request.hashes for request in whole.requests)
    assert first[0] == second[0]
    assert third[0] == fourth[0]
    assert not {*first, *second} & {*third, *fourth}


def test_answers_are_short_and_no_prompt_knows_them():
    for case in cases(SimulatorBenchOptions(num_requests=10, seeds=1, output_tokens=7), BLOCK):
        assert max(request.num_output_tokens for request in case.workload.requests) == 7
        assert not any(request.answer_hashes for request in case.workload.requests)


def test_no_calibration_is_what_is_compared():
    options = SimulatorBenchOptions(num_requests=20, seeds=3)
    found = [calibration(number, options, BLOCK) for number in range(7)]
    assert len({case.workload.requests[0].hashes for case in found}) == 7
    lengths = [[request.num_prompt_tokens for request in case.workload.requests] for case in found]
    assert not any(
        lengths[0] == [r.num_prompt_tokens for r in case.workload.requests] for case in cases(options, BLOCK)
    )


def test_a_cluster_is_simulated_at_the_pace_of_the_calibrations_around_it():
    config = UpConfig(prefill=1, decode=1, num_blocks=100)
    names = (WARM_UP, CALIBRATION, "a", CALIBRATION)
    paces = [Pace(100.0 * n, *each) for n, each in enumerate([(1.5, 2.0), (1.5, 2.0), (9.0, 9.0), (2.5, 4.0)])]
    workloads = [make_workload((10 * n, 1), (10 * n, 2), tokens=45, output=9, gap_s=1.0) for n in range(len(names))]
    blank = [
        Replay(Case(name, n, workload), "cost", 100.0 * n, ())
        for n, (name, workload) in enumerate(zip(names, workloads, strict=True))
    ]
    options = SimOptions(1, PROFILES["cpu"], num_decode=1, blocks_per_worker=100, knows_rates=False, paces=paces)
    truth = [Served.simulated(record) for record in Simulator(joined(blank), options).run().records]
    replays = [dataclasses.replace(one, served=truth[2 * n : 2 * n + 2]) for n, one in enumerate(blank)]
    found = simulate(replays, config, PROFILES["cpu"], fetch=True)
    assert [(each.pace.prefill, each.pace.decode) for each in found] == [
        pytest.approx(pair, rel=0.01) for pair in ((1.5, 2.0), (1.5, 2.0), (2.0, 3.0), (2.5, 4.0))
    ]
    assert [each.replay.is_compared for each in found] == [False, False, True, False]
    assert found[1].served == [
        dataclasses.replace(
            one,
            **{name: pytest.approx(getattr(one, name), rel=0.02) for name in ("ttft_s", "prefill_s", "latency_s")},
        )
        for one in replays[1].served
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--workload", "chat,tea"), "workload: must be one of shared-prefix, chat, sharegpt, got 'tea'"),
        (("--policy", "cost,luck"), "policy: must be one of"),
    ],
)
def test_wrong_settings_are_refused_before_anything_starts(arguments, said):
    result = CliRunner().invoke(app, ["bench", "simulator", *arguments])
    assert result.exit_code == 2
    assert said in result.stderr


def test_a_summary_has_the_spread_of_the_errors():
    figures = dict.fromkeys(Figures.__slots__, 1.0)
    runs = [
        {
            "workload": "chat",
            "policy": "cost",
            "real": figures,
            "simulated": figures,
            "error": dict.fromkeys(figures, e),
        }
        for e in (-0.1, 0.3)
    ]
    (row,) = summarize(runs)
    assert row["runs"] == 2
    assert row["ttft_mean_s"] == {"real": 1.0, "simulated": 1.0, "error": [0.1, -0.1, 0.3]}

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tailrace.cli.main import app

SMALL = ("simulate", "--workload", "chat", "--num-requests", "60", "--workers", "2")


def run(*arguments):
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.stdout, result.stderr


def test_json_is_the_same_each_time_and_has_every_figure():
    code, first, _ = run(*SMALL, "--json")
    assert code == 0
    assert first == run(*SMALL, "--json")[1]
    figures = json.loads(first)
    names = "hit_rate fetch_rate oracle_hit_rate imbalance ttft_mean_s ttft_p50_s ttft_p99_s goodput tier_hits"
    assert set(names.split()) <= figures.keys()
    assert figures["policy"] == "cost"
    assert figures["load"] == 0.7
    assert json.loads(run(*SMALL, "--json", "--seed", "4")[1])["ttft_mean_s"] != figures["ttft_mean_s"]


def test_without_json_it_is_a_table():
    code, out, _ = run(*SMALL, "--no-fetch", "--decode", "1", "--policy", "round-robin")
    assert code == 0
    assert "hit_rate" in out
    assert "round-robin" in out


def test_a_trace_is_simulated(tmp_path: Path):
    trace = tmp_path / "t.jsonl"
    lines = [
        {"timestamp": 1000 * i, "input_length": 600, "output_length": 5, "hash_ids": [0, 1 + i % 2]} for i in range(9)
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    figures = json.loads(run("simulate", "--trace", str(trace), "--workers", "1", "--json")[1])
    assert figures["requests"] == 9
    assert figures["hit_rate"] == figures["oracle_hit_rate"] == pytest.approx(8 * 512 / 5400), "full blocks only"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "best"), "policy: must be one of cost, round-robin, least-loaded, prefix, got 'best'"),
        (("--profile", "tpu"), "profile: must be one of h100, h200, cpu, got 'tpu'"),
        (("--workload", "x"), "workload: must be one of shared-prefix, chat, sharegpt, got 'x'"),
        (
            ("--workers", "4", "--blocks-per-worker", "4000000", "--decode", "1", "--decode-blocks", "5000000"),
            "blocks_per_worker: all pools together are 21,000,000 blocks; at most 20,000,000 can be simulated",
        ),
        (("--plot", "picture.pdf"), "plot: must be a .png file in a directory that exists, got picture.pdf"),
    ],
)
def test_a_wrong_setting_is_one_line(arguments, message):
    assert run("simulate", *arguments) == (2, "", f"tailrace: {message}\n")


@pytest.mark.parametrize(
    "arguments",
    [("--workers", "0"), ("--workers", "100000"), ("--load", "0"), ("--blocks-per-worker", "0"), ("--decode", "0")],
)
def test_counts_have_limits(arguments):
    code, _, err = run("simulate", *arguments)
    assert code == 2
    assert arguments[0] in err


def test_a_broken_trace_names_its_line_and_field(tmp_path: Path):
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 10, "output_length": 1}\n')
    code, out, err = run("simulate", "--trace", str(trace))
    assert (code, out, err) == (1, "", "tailrace: trace line 1: hash_ids is missing\n")


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "tailrace.sim.plot", raising=False)
    code, _, err = run(*SMALL, "--plot", str(tmp_path / "p.png"))
    assert code == 2
    assert "plot: needs matplotlib: pip install 'tailrace[plot]'" in err


def test_a_plot_is_a_picture(tmp_path: Path):
    pytest.importorskip("matplotlib")
    assert run(*SMALL, "--plot", str(tmp_path / "p.png"))[0] == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")

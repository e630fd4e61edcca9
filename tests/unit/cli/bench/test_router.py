"""The routing benchmark, small: it says what it is asked to, and fails where a decision is not what it should be."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from tailrace.cli.bench import router as bench
from tailrace.cli.bench.router import ARMS, PARTS, RouterBenchOptions, measure, run_router
from tailrace.cli.main import app
from tailrace.errors import UnavailableError

OPTIONS = RouterBenchOptions(prefill=3, decode=2, stores=1, blocks=1000, decisions=3)


@pytest.mark.parametrize("mixed_links", [False, True])
def test_every_arm_and_part_is_said(capsys: pytest.CaptureFixture[str], mixed_links: bool) -> None:
    run_router(replace(OPTIONS, mixed_links=mixed_links), as_json=True)
    result = json.loads(capsys.readouterr().out)
    assert result["benchmark"] == "router"
    assert result["options"]["prefill"] == 3
    assert {arm: set(parts) for arm, parts in result["decision_us"].items()} == {arm: set(PARTS) for arm in ARMS}
    for parts in result["decision_us"].values():
        assert 0 < parts["all"]["p50"] <= parts["all"]["p99"]


def test_as_many_decisions_are_counted_as_were_asked_for_and_parts_add_up() -> None:
    for parts in measure(OPTIONS).values():
        assert {len(times) for times in parts.values()} == {OPTIONS.decisions}
        for n in range(OPTIONS.decisions):
            assert sum(parts[part][n] for part in PARTS[:-1]) == pytest.approx(parts["all"][n], rel=1e-6)


def test_a_router_that_finds_nothing_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.CompactIndex, "longest_prefix", lambda index, hashes: {})
    with pytest.raises(UnavailableError, match="0 blocks found, where 600 are held"):
        measure(OPTIONS)


@pytest.mark.parametrize("arguments", [["--prefill", "0"], ["--decode", "2000"], ["--blocks", "1"]])
def test_impossible_sizes_are_refused(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["bench", "router", *arguments]).exit_code == 2

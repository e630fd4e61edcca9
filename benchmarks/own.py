"""Tailrace's own benchmarks, each as a user would run it; and the numbers that they are to reach."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.workloads import ROOT

Result = Mapping[str, Any]
TIMEOUT_S = 240

COMMANDS: Mapping[str, tuple[str, ...]] = {
    "engine batch 1": ("engine", "--batch", "1", "--input", "128", "--output", "64"),
    "engine batch 32": ("engine", "--batch", "32", "--input", "256", "--output", "128"),
    "engine prefill": (
        "engine",
        "--batch",
        "1",
        "--input",
        "1024",
        "--output",
        "2",
        "--max-num-batched-tokens",
        "1024",
    ),
    "serve": (
        *("serve", "--prefill", "0", "--decode", "1", "--threads", "1", "--concurrency", "32", "--num-requests", "32"),
        *("--input-tokens", "256", "--output-tokens", "128"),
    ),
    "handoff": ("handoff", "--rounds", "5"),
    "gateway": ("gateway", "--rounds", "3", "--seconds", "5"),
    "interference": ("interference", "--rounds", "2", "--seconds", "10"),
}


@dataclass(frozen=True, slots=True)
class OwnResult:
    name: str
    command: str
    result: Result | None
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Goal:
    what: str
    benchmark: str
    value: Callable[[Result], float]
    must: float
    aim: float
    at_most: bool = False
    """The smaller the better."""

    def is_met(self, value: float) -> bool:
        return value <= self.must if self.at_most else value >= self.must


GOALS = (
    Goal("MBU at batch 1", "engine batch 1", lambda r: r["mbu_decode"], 0.65, 0.85),
    Goal("prefill MFU, 1,024 tokens", "engine prefill", lambda r: r["mfu_prefill"], 0.45, 0.65),
    Goal(
        *("host overhead of a step at batch 32", "engine batch 32", lambda r: r["decode_step"]["host_overhead"]),
        *(0.10, 0.05, True),
    ),
    Goal(
        *("scheduler at 256 running sequences, us", "engine batch 32", lambda r: r["scheduler_us_256_sequences"]),
        *(500, 150, True),
    ),
    Goal(
        *("gateway CPU a token, us", "gateway", lambda r: r["gateway"]["cpu_us_per_token"]["median"], 20, 10, True),
    ),
    Goal("gateway over FastAPI + pydantic", "gateway", lambda r: r["gateway_over_plain"], 0.5, 0.25, True),
    Goal("first token, P/D over colocated", "handoff", lambda r: r["first_token_ratio"], 1.02, 1.0, True),
    Goal("second token, P/D over colocated", "handoff", lambda r: r["second_token_ratio"], 1.08, 1.04, True),
    Goal(
        *("ICL p99, colocated unchunked over P/D", "interference", lambda r: r["icl_p99_unchunked_over_pd"], 5, 10),
    ),
    Goal("ICL p99, colocated chunked over P/D", "interference", lambda r: r["icl_p99_chunked_over_pd"], 1.5, 2),
)


def run_own(
    model: str, say: Callable[[str], None], commands: Mapping[str, tuple[str, ...]] = COMMANDS
) -> list[OwnResult]:
    """One after another; one that fails is in the list with what it said."""
    return [_run(name, (*arguments, "--model", model), say) for name, arguments in commands.items()]


def _run(name: str, arguments: Sequence[str], say: Callable[[str], None]) -> OwnResult:
    command = ("bench", *arguments, "--json")
    shown = " ".join(("tailrace", *command))
    say(shown)
    try:
        done = subprocess.run(
            (sys.executable, "-m", "tailrace.cli.main", *command),
            cwd=ROOT,
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return OwnResult(name, shown, None, f"not done within {TIMEOUT_S} s")
    if done.returncode != 0:
        return OwnResult(name, shown, None, " | ".join(done.stderr.strip().splitlines()[-3:]))
    return OwnResult(name, shown, json.loads(done.stdout))


def server_over_engine(results: Mapping[str, Result]) -> float | None:
    """Output tokens a second of the whole server at 32 streams, over the engine alone on the same workload."""
    if "serve" not in results or "engine batch 32" not in results:
        return None
    return float(results["serve"]["output_tokens_per_s"] / results["engine batch 32"]["output_tokens_per_s"])

"""Tailrace's own benchmarks, each as a user would run it."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil

from benchmarks.goals import Result
from benchmarks.workloads import ROOT

TIMEOUT_S = 240

COMMANDS: Mapping[str, tuple[str, ...]] = {
    "engine batch 1": ("engine", "--batch", "1", "--input", "128", "--output", "64"),
    "engine batch 32": ("engine", "--batch", "32", "--input", "256", "--output", "128"),
    "engine prefill": (
        *("engine", "--batch", "1", "--input", "1024", "--output", "2", "--max-num-batched-tokens", "1024"),
    ),
    "engine int8": ("engine", "--quantization", "int8", "--batch", "32", "--input", "256", "--output", "128"),
    "accuracy": ("accuracy",),
    "overhead": ("overhead", "--rounds", "3"),
    "handoff": ("handoff", "--rounds", "10"),
    "transfer": ("transfer", "--rounds", "40"),
    "gateway": ("gateway", "--rounds", "3", "--seconds", "5"),
    "interference": ("interference", "--rounds", "2", "--seconds", "12"),
    "idle": ("idle", "--seconds", "20"),
}


@dataclass(frozen=True, slots=True)
class OwnResult:
    name: str
    command: str
    result: Result | None
    failure: str = ""
    other_cores: float = 0.0
    """CPU seconds a second of everybody else on this machine, meanwhile."""


def run_own(
    model: str, say: Callable[[str], None], commands: Mapping[str, tuple[str, ...]] = COMMANDS
) -> list[OwnResult]:
    """One after another; one that fails is in the list with what it said."""
    with_model = {"transfer": ()}
    return [
        _run(name, (*arguments, *with_model.get(name, ("--model", model))), say) for name, arguments in commands.items()
    ]


def _run(name: str, arguments: Sequence[str], say: Callable[[str], None]) -> OwnResult:
    command = ("bench", *arguments, "--json")
    shown = " ".join(("tailrace", *command))
    say(shown)
    before, began = _cpu_s(), time.monotonic()
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
    others = max(0.0, _cpu_s() - before) / (time.monotonic() - began)
    say(f"  {time.monotonic() - began:.0f} s, beside {others:.2f} cores of others")
    if done.returncode != 0:
        return OwnResult(name, shown, None, " | ".join(done.stderr.strip().splitlines()[-3:]), others)
    try:
        return OwnResult(name, shown, json.loads(done.stdout), other_cores=others)
    except json.JSONDecodeError:
        return OwnResult(name, shown, None, "it was stopped: no result", others)


def _cpu_s() -> float:
    """CPU seconds of everybody, without those of our children that have ended, and theirs."""
    everybody, children = psutil.cpu_times(), resource.getrusage(resource.RUSAGE_CHILDREN)
    return float(everybody.user + everybody.nice + everybody.system - children.ru_utime - children.ru_stime)

"""`make bench`: Tailrace and its peers take turns on the same cores; then Tailrace's own benchmarks; one page of it.

Run as `python -m benchmarks.compare`. Nothing else should run meanwhile: the page says what did.
"""

import argparse
import datetime
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.arms import Answer, Arm, ArmFailedError, ArmSpec
from benchmarks.own import COMMANDS, run_own
from benchmarks.page import Heading, load_notes, page
from benchmarks.workloads import ROOT, Group, Workload, plan
from tailrace.checkpoint.model_config import load_model_config
from tailrace.checkpoint.resolve import resolve_model
from tailrace.cli.bench.report import machine
from tailrace.config import DEFAULT_MODEL
from tailrace.cores import available_cores

WARMUP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Sample:
    """One arm, one workload, one round."""

    output_tokens_per_s: float
    """All output tokens over the whole time, prefill included."""
    decode_tokens_per_s: float | None
    """Tokens after the first over the time beyond that of the same prompts with one token each."""
    other_cores: float
    own_cores: float
    tokens: tuple[int, ...]

    @classmethod
    def of(cls, workload: Workload, first: Answer | None, whole: Answer) -> "Sample":
        later = workload.batch * (workload.output - 1)
        return cls(
            whole.output_tokens / whole.wall_s,
            None if first is None else later / max(1e-9, whole.wall_s - first.wall_s),
            whole.other_cores,
            whole.own_cores,
            whole.tokens,
        )


@dataclass(slots=True)
class GroupResult:
    group: Group
    abouts: dict[str, dict[str, Any]] = field(default_factory=dict)
    started_in_s: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    samples: dict[tuple[Workload, str], list[Sample]] = field(default_factory=dict)
    """By workload and arm, a round each; samples of one index were taken one after another."""


def measure(group: Group, rounds: int, vocab_size: int, logs: Path) -> GroupResult:
    result = GroupResult(group)
    with ExitStack() as stack:
        arms = [arm for spec in group.arms if (arm := _start(spec, result, logs, stack)) is not None]
        for workload in group.workloads:
            able = [arm for arm in arms if workload.batch <= arm.spec.max_batch]
            for turn in range(-1, rounds):
                shift = turn % max(1, len(able))
                for arm in able[shift:] + able[:shift]:
                    _take_turn(result, arm, workload, turn, vocab_size)
    return result


def _start(spec: ArmSpec, result: GroupResult, logs: Path, stack: ExitStack) -> Arm | None:
    """None, and the reason in the result, when it does not start."""
    _say(f"starting {spec.name} on {len(spec.cores)} core(s)")
    try:
        arm = Arm(spec, logs / f"{spec.name}-{len(spec.cores)}.log")
    except (ArmFailedError, OSError) as error:
        result.failures[spec.name] = str(error)
        _say(str(error))
        return None
    stack.callback(arm.end)
    result.abouts[spec.name] = arm.about
    result.started_in_s[spec.name] = arm.started_in_s
    return arm


def _take_turn(result: GroupResult, arm: Arm, workload: Workload, turn: int, vocab_size: int) -> None:
    """Turn -1 is the warm-up. An arm that has failed is asked no more."""
    name = arm.spec.name
    if name in result.failures:
        return
    prompts = workload.prompts(vocab_size, turn)
    try:
        if turn < 0:
            arm.ask(prompts, WARMUP_TOKENS)
            return
        first = arm.ask(prompts, 1) if workload.with_first else None
        sample = Sample.of(workload, first, arm.ask(prompts, workload.output))
    except ArmFailedError as error:
        result.failures[name] = str(error)
        return
    result.samples.setdefault((workload, name), []).append(sample)
    rate, others = sample.output_tokens_per_s, sample.other_cores
    _say(f"{workload}, round {turn + 1}: {name} {rate:.1f} tokens/s beside {others:.2f} cores of others")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--venvs", type=Path, default=ROOT / "benchmarks" / ".venvs")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / f"{datetime.date.today()}.md")
    parser.add_argument("--only", choices=("peers", "own"), help="half of it")
    parser.add_argument("--own", nargs="+", choices=tuple(COMMANDS), default=tuple(COMMANDS), help="of our own, these")
    parser.add_argument("--notes", type=Path, default=ROOT / "benchmarks" / "notes.toml", help="by row, in TOML")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    command = " ".join(("python -m benchmarks.compare", *sys.argv[1:]))
    heading = Heading(options.out.stem, command, options.model, machine(), load_notes(options.notes))
    model = resolve_model(options.model)
    groups: list[GroupResult] = []
    with tempfile.TemporaryDirectory(prefix="tailrace-bench-") as logs:
        if options.only != "own":
            vocab_size = load_model_config(model).vocab_size
            for group in plan(model, options.venvs, available_cores()):
                groups.append(measure(group, options.rounds, vocab_size, Path(logs)))
    wanted = {name: COMMANDS[name] for name in options.own}
    own = run_own(options.model, _say, wanted) if options.only != "peers" else []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(page(heading, groups, own)) + "\n", encoding="utf-8")
    _say(f"written: {options.out}")


if __name__ == "__main__":
    main()

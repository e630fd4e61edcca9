"""The page of a comparison: who was how fast, over how many rounds, beside how much else. Losses stand as they are."""

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.own import GOALS, Goal, OwnResult, server_over_engine
from benchmarks.workloads import Workload
from tailrace.cli.bench.report import Spread

if TYPE_CHECKING:
    from benchmarks.compare import GroupResult, Sample

BUSY = 0.15
"""Cores of others, beyond which a measurement is not to be trusted."""

HOW = """\
Medians with the least and the greatest of the rounds. In a round everybody continues the same prompts on the same
cores, one after another, greedily, prefix caches off; the others are stopped meanwhile. A ratio is the median of the
ratios within a round. Output tokens/s: all of them over the whole time, prefill included. Decode tokens/s: those after
the first, over the time beyond that of the same prompts with one token each. Cores of others: what the rest of the
machine used meanwhile, at most. Same tokens: how many of the first prompt's came alike before the first that differs.
"""
COLUMNS = (
    "",
    "output tokens/s",
    "Tailrace over it",
    "decode tokens/s",
    "Tailrace over it",
    "cores of others",
    "same tokens",
)


def write_page(
    path: Path, model: str, machine: dict[str, Any], groups: "Sequence[GroupResult]", own: Sequence[OwnResult]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(page(path.stem, model, machine, groups, own)) + "\n", encoding="utf-8")


def page(
    title: str, model: str, machine: dict[str, Any], groups: "Sequence[GroupResult]", own: Sequence[OwnResult]
) -> Iterator[str]:
    yield f"# Benchmarks, {title}\n"
    yield f"`make bench` on {machine['processor']}, {machine['cores']} cores, Python {machine['python']}; model"
    yield f"{model}; load average {machine['load_before']} before it began.\n"
    yield HOW
    for group in groups:
        yield from _group(group)
    if own:
        yield from _own(own)


# -- beside peers -----------------------------------------------------------------------------------------------------


def _group(result: "GroupResult") -> Iterator[str]:
    yield f"\n## Beside peers: {result.group.title}\n"
    for name, about in result.abouts.items():
        versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
        settings = ", ".join(f"{key} {value}" for key, value in about["settings"].items())
        yield f"- {name}: {versions}; {settings}; started in {result.started_in_s[name]:.0f} s"
    for name in result.group.missing:
        yield f"- {name}: not measured, not set up (`make bench-peers`)"
    for name, why in result.failures.items():
        yield f"- {name}: not measured to the end: {why}"
    for workload in result.group.workloads:
        yield from _workload(result, workload)


def _workload(result: "GroupResult", workload: Workload) -> Iterator[str]:
    yield f"\n### {workload}\n"
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|---" * len(COLUMNS) + "|"
    own = result.samples.get((workload, "tailrace"), [])
    for arm in (spec.name for spec in result.group.arms):
        if not (samples := result.samples.get((workload, arm))):
            continue
        others = max(sample.other_cores for sample in samples)
        cells = [
            *_rate_and_ratio(own, samples, lambda sample: sample.output_tokens_per_s),
            *_rate_and_ratio(own, samples, lambda sample: sample.decode_tokens_per_s),
            f"{others:.2f}{' (busy)' if others > BUSY else ''}",
            "" if own is samples else _agreement(own, samples),
        ]
        yield f"| {arm} | {' | '.join(cells)} |"


def _rate_and_ratio(
    own: "Sequence[Sample]", samples: "Sequence[Sample]", rate: "Callable[[Sample], float | None]"
) -> tuple[str, str]:
    """Two cells; the second is empty for ourselves."""
    rates = [value for sample in samples if (value := rate(sample)) is not None]
    ours = [value for sample in own if (value := rate(sample)) is not None]
    if not rates:
        return "-", ""
    return str(Spread.of(rates)), "" if own is samples else _ratio(ours, rates)


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    if not ours:
        return "-"
    ratio = Spread.of([a / b for a, b in zip(ours, theirs, strict=False)])
    loss = " **loss**" if ratio.median < 1 else ""
    return f"{ratio.median:.2f} ({ratio.min:.2f}-{ratio.max:.2f}){loss}"


def _agreement(own: "Sequence[Sample]", peer: "Sequence[Sample]") -> str:
    """How many of a first prompt's tokens came alike before the first difference, which a near-tie may make."""
    counts = [_common(a.tokens, b.tokens) for a, b in zip(own, peer, strict=False)]
    return f"{statistics.median(counts):g} of {len(peer[0].tokens)}" if counts else "-"


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# -- our own ----------------------------------------------------------------------------------------------------------


def _own(own: Sequence[OwnResult]) -> Iterator[str]:
    results = {entry.name: entry.result for entry in own if entry.result is not None}
    yield "\n## Tailrace alone\n"
    yield "| what | measured | must | aim | |"
    yield "|---|---|---|---|---|"
    for goal in GOALS:
        if goal.benchmark in results:
            yield _goal_row(goal, goal.value(results[goal.benchmark]))
    if (share := server_over_engine(results)) is not None:
        yield _goal_row(Goal("whole server over engine alone, 32 streams", "serve", lambda r: share, 0.90, 0.97), share)
    yield ""
    for entry in own:
        if entry.result is None:
            yield f"- `{entry.command}` failed: {entry.failure}"
    for entry in own:
        if entry.result is not None:
            said = json.dumps(
                {key: value for key, value in entry.result.items() if key not in ("command", "machine")}, indent=1
            )
            yield f"<details><summary><code>{entry.command}</code></summary>\n\n```json\n{said}\n```\n</details>\n"


def _goal_row(goal: Goal, value: float) -> str:
    sign = "<=" if goal.at_most else ">="
    verdict = "" if goal.is_met(value) else "**missed**"
    return f"| {goal.what} | {value:.3g} | {sign} {goal.must:g} | {goal.aim:g} | {verdict} |"

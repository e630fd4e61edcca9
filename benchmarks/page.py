"""The page of a comparison: who was how fast, over how many rounds, beside how much else. Losses stand as they are."""

import json
import statistics
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.goals import GOALS, PEER_GOALS
from benchmarks.own import OwnResult
from benchmarks.workloads import OWN_ARMS, Workload
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


@dataclass(frozen=True, slots=True)
class Heading:
    """What a page says before its figures."""

    title: str
    command: str
    model: str
    machine: Mapping[str, Any]
    notes: Mapping[str, str] = field(default_factory=dict)
    """By row: why it was missed, and what is next."""


def page(heading: Heading, groups: "Sequence[GroupResult]", own: Sequence[OwnResult]) -> Iterator[str]:
    machine = heading.machine
    yield f"# Benchmarks, {heading.title}\n"
    yield f"`{heading.command}` on {machine['processor']}, {machine['cores']} cores, Python {machine['python']}; model"
    yield f"{heading.model}; load average {machine['load_before']} before it began."
    yield from _rows(heading.notes, groups, own)
    if groups:
        yield f"\n{HOW}"
    for group in groups:
        yield from _group(group)
    if own:
        yield from _own(own)


def load_notes(path: Path) -> dict[str, str]:
    """TOML, a row's name = its note. Raises ValueError for a row that there is not."""
    notes: dict[str, str] = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if strange := set(notes) - {goal.what for goal in (*PEER_GOALS, *GOALS)}:
        raise ValueError(f"{path}: no such rows: {', '.join(sorted(strange))}")
    return notes


# -- numbers to reach -------------------------------------------------------------------------------------------------


def _rows(notes: Mapping[str, str], groups: "Sequence[GroupResult]", own: Sequence[OwnResult]) -> Iterator[str]:
    """Of the halves that were asked for."""
    results = {entry.name: entry.result for entry in own if entry.result is not None}
    asked = {entry.name for entry in own}
    rows = [goal.row(groups) for goal in PEER_GOALS] if groups else []
    rows += [goal.row(results) for goal in GOALS if goal.benchmark in asked]
    yield "\n## Numbers to reach\n"
    yield "| what | measured: median (min-max) | must | aim | | |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        sign = "<=" if row.limits.at_most else ">="
        said = _figure(row.measured) if row.measured else f"not measured: {row.why_not}"
        verdict = row.limits.verdict(row.measured.median) if row.measured else ""
        limits = f"{sign} {row.limits.must:g} | {row.limits.aim:g}"
        yield f"| {row.what} | {said} | {limits} | {verdict} | {notes.get(row.what, '')} |"


def _figure(spread: Spread) -> str:
    if spread.min == spread.max:
        return f"{spread.median:.3g}"
    return f"{spread.median:.3g} ({spread.min:.3g}-{spread.max:.3g})"


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
            *_rate_and_ratio(own, samples, lambda sample: sample.output_tokens_per_s, is_peer=arm not in OWN_ARMS),
            *_rate_and_ratio(own, samples, lambda sample: sample.decode_tokens_per_s, is_peer=arm not in OWN_ARMS),
            f"{others:.2f}{' (busy)' if others > BUSY else ''}",
            "" if own is samples else _agreement(own, samples),
        ]
        yield f"| {arm} | {' | '.join(cells)} |"


def _rate_and_ratio(
    own: "Sequence[Sample]",
    samples: "Sequence[Sample]",
    rate: "Callable[[Sample], float | None]",
    *,
    is_peer: bool,
) -> tuple[str, str]:
    """Two cells; the second is empty for ourselves."""
    rates = [value for sample in samples if (value := rate(sample)) is not None]
    ours = [value for sample in own if (value := rate(sample)) is not None]
    if not rates:
        return "-", ""
    return str(Spread.of(rates)), "" if own is samples else _ratio(ours, rates, is_peer=is_peer)


def _ratio(ours: Sequence[float], theirs: Sequence[float], *, is_peer: bool) -> str:
    if not ours:
        return "-"
    ratio = Spread.of([a / b for a, b in zip(ours, theirs, strict=False)])
    loss = " **loss**" if is_peer and ratio.median < 1 else ""
    return f"{ratio.median:.2f} ({ratio.min:.2f}-{ratio.max:.2f}){loss}"


def _agreement(own: "Sequence[Sample]", peer: "Sequence[Sample]") -> str:
    """How many of a first prompt's tokens came alike before the first difference, which a near-tie may make."""
    counts = [_common(a.tokens, b.tokens) for a, b in zip(own, peer, strict=False)]
    return f"{statistics.median(counts):g} of {len(peer[0].tokens)}" if counts else "-"


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# -- our own ----------------------------------------------------------------------------------------------------------


def _own(own: Sequence[OwnResult]) -> Iterator[str]:
    yield "\n## Tailrace alone\n"
    versions = next((entry.result["versions"] for entry in own if entry.result and "versions" in entry.result), {})
    said = ", ".join(f"{package} {version}" for package, version in versions.items())
    yield f"{said}. Cores of others: what the rest"
    yield "of the machine used while a command ran, on average.\n"
    for entry in own:
        busy = " (busy)" if entry.other_cores > BUSY else ""
        load = f"{entry.other_cores:.2f} cores of others{busy}"
        if entry.result is None:
            yield f"- `{entry.command}` failed ({load}): {entry.failure}\n"
            continue
        figures = {key: value for key, value in entry.result.items() if key not in ("command", "machine", "versions")}
        yield f"<details><summary><code>{entry.command}</code>, {load}</summary>\n"
        yield f"```json\n{json.dumps(figures, indent=1)}\n```\n</details>\n"

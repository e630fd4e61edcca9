"""Workloads that the routing policies were not made on, as traces in Mooncake's format: the same seed, the same lines.

Lengths and shares that are known of public traces are in each docstring; what is not is made up, and extreme on
purpose. A timestamp is in milliseconds; `tailrace simulate --load` stretches all of them.

`python -m benchmarks.other_workloads write KIND FILE` writes a trace of 2,000 requests, `... compare WORKERS` prints
the first table of docs/benchmarks/2026-11-22-other-traces.md, some minutes.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from benchmarks.simulated_routing import PROFILE, simulate
from tailrace.sim.result import SimResult
from tailrace.sim.simulator import SimOptions
from tailrace.sim.workload import read_trace

GAP_S = 0.3
"""Between requests on average, as in the conversation trace."""
MAX_TOKENS = 120_000


@dataclass(frozen=True, slots=True)
class Line:
    timestamp: int
    input_length: int
    output_length: int
    hash_ids: list[int]


class Maker:
    """Random numbers of one seed, and names of blocks that nobody had before."""

    def __init__(self, kind: str, seed: int, block_tokens: int) -> None:
        self.random = Random(f"{kind} {seed}")
        self._block_tokens = block_tokens
        self._ids = count()

    def prefix(self, tokens: float) -> list[int]:
        """Full blocks of so many tokens, one at least."""
        return [next(self._ids) for _ in range(max(1, round(tokens / self._block_tokens)))]

    def line(self, at_s: float, prefix: list[int], own_tokens: float, answer: float) -> Line:
        """A prompt that begins with `prefix` and goes on as no other does."""
        tokens = min(MAX_TOKENS, len(prefix) * self._block_tokens + max(1, int(own_tokens)))
        ids = prefix[: tokens // self._block_tokens]
        fresh = math.ceil(tokens / self._block_tokens) - len(ids)
        ids = ids + [next(self._ids) for _ in range(fresh)]
        return Line(int(at_s * 1e3), tokens, max(1, int(answer)), ids)

    def full(self, line: Line) -> list[int]:
        """Its full blocks: the prefix of the next turn."""
        return line.hash_ids[: line.input_length // self._block_tokens]

    def gap_s(self, mean_s: float = GAP_S) -> float:
        return self.random.expovariate(1 / mean_s)

    def about(self, mean: float) -> float:
        return self.random.expovariate(1 / mean)

    def ranked(self, num: int, exponent: float = 1.0) -> int:
        """By Zipf's law."""
        return self.random.choices(range(num), _weights(num, exponent))[0]


def _weights(num: int, exponent: float) -> list[float]:
    return [(rank + 1) ** -exponent for rank in range(num)]


def _turns(
    make: Maker, begin_s: float, prefix: list[int], num_turns: int, own: float, answer: float, pause_s: float
) -> Iterator[Line]:
    """Each turn's prompt is the last one's, its answer (whose blocks no other prompt has) and something new."""
    now_s = begin_s
    for _ in range(num_turns):
        line = make.line(now_s, prefix, make.about(own + answer), make.about(answer))
        yield line
        prefix = make.full(line)
        now_s += make.about(pause_s)


def tool_agent(make: Maker, num: int) -> Iterator[Line]:
    """Agents with tools. Mooncake's trace of that name has 23,608 requests of 8,596 tokens in and 182 out on average,
    of which an infinite cache holds 59 %: few long instructions that many share, and calls that soon follow."""
    kinds = [make.prefix(make.random.uniform(2000, 8000)) for _ in range(40)]
    now_s = 0.0
    while True:
        now_s += make.gap_s(GAP_S * 3)
        yield from _turns(make, now_s, kinds[make.ranked(40)], 1 + int(make.about(2)), 2600, 182, 6.0)


def documents_and_chat(make: Maker, num: int) -> Iterator[Line]:
    """Mooncake's synthetic trace: 3,993 requests of 15,325 tokens in and 149 out, 66 % of them in an infinite cache:
    long documents asked several questions between prompts of 20 to 700 tokens."""
    now_s = 0.0
    while True:
        now_s += make.gap_s(GAP_S * 4)
        if make.random.random() < 0.5:
            yield from _turns(make, now_s, [], 1 + int(make.about(3)), 150, 250, 20.0)
        else:
            document = make.prefix(make.random.lognormvariate(10.0, 0.4))
            for _ in range(1 + int(make.about(4))):
                yield make.line(now_s, document, make.about(150), make.about(40))
                now_s += make.gap_s(8.0)


def questions(make: Maker, num: int) -> Iterator[Line]:
    """LooGLE-like: documents of some 24,000 tokens, each asked seven questions within seconds, then never again."""
    now_s = 0.0
    while True:
        now_s += make.gap_s(GAP_S * 7)
        document = make.prefix(make.random.uniform(12_000, 36_000))
        for _ in range(7):
            yield make.line(now_s, document, make.about(100), make.about(100))
            now_s += make.gap_s(2.0)


def retrieval(make: Maker, num: int) -> Iterator[Line]:
    """A system prompt, three of 2,000 passages of 1,024 tokens by Zipf, a question: what is shared is seldom deep."""
    system = make.prefix(1024)
    passages: dict[tuple[int, ...], list[int]] = {}
    now_s = 0.0
    while True:
        now_s += make.gap_s()
        prefix, path = system, tuple[int, ...]()
        for _ in range(3):
            path = (*path, make.ranked(2000, 1.1))
            if path not in passages:
                passages[path] = make.prefix(1024)
            prefix = prefix + passages[path]
        yield make.line(now_s, prefix, make.about(100), make.about(200))


def hot_prefix(make: Maker, num: int) -> Iterator[Line]:
    """Nine in ten begin with the same 8,192 tokens, the tenth is like no other."""
    hot = make.prefix(8192)
    now_s = 0.0
    while True:
        now_s += make.gap_s()
        is_hot = make.random.random() < 0.9
        yield make.line(now_s, hot if is_hot else [], make.about(800 if is_hot else 6000), make.about(200))


def bursts(make: Maker, num: int) -> Iterator[Line]:
    """Forty requests within a second about one of 50 documents of 4,000 to 16,000 tokens, then a pause."""
    documents = [make.prefix(make.random.uniform(4000, 16_000)) for _ in range(50)]
    now_s = 0.0
    while True:
        document = documents[make.ranked(50)]
        for _ in range(40):
            yield make.line(now_s + make.random.random(), document, make.about(600), make.about(150))
        now_s += make.gap_s(GAP_S * 40)


def day(make: Maker, num: int) -> Iterator[Line]:
    """Conversations that come a tenth as often at the ends of the trace as in its middle."""
    length_s = num * GAP_S
    system = make.prefix(1536)
    now_s = 0.0
    while True:
        share = max(0.1, math.sin(math.pi * min(1.0, now_s / length_s)))
        now_s += make.gap_s(GAP_S * 5 * 0.65 / share)
        yield from _turns(make, now_s, system, 1 + int(make.about(4)), 1500, 400, 40.0)


def long_sessions(make: Maker, num: int) -> Iterator[Line]:
    """Sessions of thirty turns: most of a late prompt has been computed before."""
    now_s = 0.0
    while True:
        now_s += make.gap_s(GAP_S * 30)
        yield from _turns(make, now_s, make.prefix(1024), 30, 600, 400, 20.0)


def tiny(make: Maker, num: int) -> Iterator[Line]:
    """Prompts of some 150 tokens below one of three system prompts of 64."""
    systems = [make.prefix(64) for _ in range(3)]
    now_s = 0.0
    while True:
        now_s += make.gap_s()
        yield make.line(now_s, make.random.choice(systems), make.random.lognormvariate(4.6, 0.8), make.about(200))


def giants(make: Maker, num: int) -> Iterator[Line]:
    """One request in twenty is of 50,000 to 110,000 tokens, and half of those are asked again; the rest are short."""
    now_s, old = 0.0, [make.prefix(60_000)]
    while True:
        now_s += make.gap_s()
        if make.random.random() >= 0.05:
            yield make.line(now_s, [], make.about(1000), make.about(200))
            continue
        if make.random.random() < 0.5:
            old.append(make.prefix(make.random.uniform(50_000, 110_000)))
        yield make.line(now_s, make.random.choice(old[-20:]), make.about(300), make.about(200))


def unique(make: Maker, num: int) -> Iterator[Line]:
    """Nothing is shared."""
    now_s = 0.0
    while True:
        now_s += make.gap_s()
        yield make.line(now_s, [], make.random.lognormvariate(8.0, 1.2), make.about(200))


def drift(make: Maker, num: int) -> Iterator[Line]:
    """Of 30 prefixes of 6,000 tokens the most asked one changes every 200 requests, and old ones are forgotten."""
    now_s, prefixes = 0.0, [make.prefix(6000) for _ in range(30)]
    for number in count(1):
        now_s += make.gap_s()
        yield make.line(now_s, prefixes[make.ranked(30, 1.3)], make.about(1000), make.about(200))
        if number % 200 == 0:
            prefixes = [make.prefix(6000), *prefixes[:-1]]


def branches(make: Maker, num: int) -> Iterator[Line]:
    """A prompt of some 10,000 tokens, then eight at once that go on from it: agents that split their work."""
    now_s = 0.0
    while True:
        now_s += make.gap_s(GAP_S * 9)
        trunk = make.line(now_s, [], 2000 + make.about(8000), make.about(300))
        yield trunk
        for _ in range(8):
            yield make.line(now_s + 10.0, make.full(trunk), make.about(1500), make.about(300))


KINDS: dict[str, Callable[[Maker, int], Iterator[Line]]] = {
    make.__name__.replace("_", "-"): make
    for make in (
        tool_agent,
        documents_and_chat,
        questions,
        retrieval,
        hot_prefix,
        bursts,
        day,
        long_sessions,
        tiny,
        giants,
        unique,
        drift,
        branches,
    )
}


def lines(kind: str, num: int, seed: int, block_tokens: int) -> list[Line]:
    """`num` of them, in the order of arrival. Raises KeyError for a kind that is not one of KINDS."""
    made = KINDS[kind](Maker(kind, seed, block_tokens), num)
    return sorted((next(made) for _ in range(num)), key=lambda line: line.timestamp)


def write(path: Path, kind: str, num: int, seed: int, block_tokens: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(line)) + "\n" for line in lines(kind, num, seed, block_tokens))


OTHERS = ("least-loaded", "round-robin", "prefix")
SEEDS = (0, 1, 2)
BLOCK_TOKENS = 512


def compare(num_workers: int, num_requests: int = 1000) -> None:
    """Every kind, nothing fetched: what `cost` finds, and mean TTFTs of the others over its own."""
    print("| workload | load | oracle | over oracle | imbalance | TTFT mean, ms |", " | ".join(OTHERS), "|")
    print("|---|---|---|---|---|---|---|---|---|")
    for kind in KINDS:
        for load in (0.7, 1.5):
            found = [_policies(kind, seed, load, num_workers, num_requests) for seed in SEEDS]
            cost = [results["cost"] for results in found]
            cells = [
                _spread([r.oracle_hit_rate for r in cost]),
                _spread([r.hit_rate / (r.oracle_hit_rate or 1.0) for r in cost]),
                _spread([r.imbalance for r in cost]),
                _spread([r.ttft_mean_s * 1e3 for r in cost], ",.1f"),
                *(_spread([r[name].ttft_mean_s / r["cost"].ttft_mean_s for r in found]) for name in OTHERS),
            ]
            print(f"| {kind} | {load} |", " | ".join(cells), "|", flush=True)


def _policies(kind: str, seed: int, load: float, num_workers: int, num_requests: int) -> dict[str, SimResult]:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "trace.jsonl"
        write(path, kind, num_requests, seed, BLOCK_TOKENS)
        trace = read_trace(path, BLOCK_TOKENS)
    options = {name: SimOptions(num_workers, PROFILE, policy=name, fetch=False) for name in ("cost", *OTHERS)}
    return {name: simulate(trace, option, load) for name, option in options.items()}


def _spread(values: Sequence[float], form: str = ",.2f") -> str:
    return f"{min(values):{form}} to {max(values):{form}}"


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[3]), sys.argv[2], 2000, 0, BLOCK_TOKENS)
    else:
        compare(int(sys.argv[2]))

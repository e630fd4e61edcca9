"""`tailrace bench offers`: what a worker's speed loses to the offers that it makes to a store, and the CPU they take.

Two clusters on this machine that are alike, one of them with a store, which lacks every prompt and takes all that it is
offered. They take turns at the same prompts, in an order that changes from round to round. Either the decode worker
computes the prompts as well and is measured in output tokens a second, or a prefill worker does, whose answers are
one token long, in prompts a second.
"""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from tailrace.checkpoint.model_config import load_model_config
from tailrace.cli.bench.load import Asker, Body, completion_body, in_parallel, token_prompts
from tailrace.cli.bench.report import Spread, header, print_footer, served
from tailrace.cli.bench.run import measure_and_show
from tailrace.cli.cluster import STORE, Cluster, running_cluster
from tailrace.cli.console import ClusterConsole
from tailrace.cli.model import fetch_model
from tailrace.config import UpConfig
from tailrace.errors import UnavailableError

ARMS = ("none", "store")
_CPU = {"worker_cpu_ms": "the worker", "loop_cpu_ms": "its event loop", "store_cpu_ms": "the store"}


@dataclass(frozen=True, slots=True)
class OffersOptions:
    role: str = "decode"
    """Of the worker that is measured: decode or prefill."""
    requests: int = 32
    """Of one turn."""
    concurrency: int = 8
    input: int = 40
    output: int = 96
    """Tokens of an answer; of a prefill worker's it is 1."""
    rounds: int = 6
    """Counted, after one that is not."""
    num_blocks: int = 200
    """Of a worker's pool."""
    store_memory: str = "256MiB"

    @property
    def output_tokens(self) -> int:
        return self.output if self.role == "decode" else 1


@dataclass(slots=True)
class ArmTurns:
    """One entry a round."""

    answers_per_s: list[float] = field(default_factory=list)
    worker_cpu_ms: list[float] = field(default_factory=list)
    """Of all threads of the worker's process, an answer."""
    loop_cpu_ms: list[float] = field(default_factory=list)
    """Of its event loop's thread alone."""
    store_cpu_ms: list[float] = field(default_factory=list)
    """Of the store's process; zeros where there is none."""

    def summary(self) -> dict[str, Any]:
        """CPU as the mean of the turns: the kernel counts it in steps of 10 ms."""
        means = {name: round(fmean(getattr(self, name)), 3) for name in _CPU}
        return {"answers_per_s": asdict(Spread.of(self.answers_per_s, digits=3)), **means}


def run_offers(config: UpConfig, options: OffersOptions, *, as_json: bool) -> None:
    """Prints a table, or one JSON object on stdout. Raises ConfigError, ChildFailedError or UnavailableError."""
    model = fetch_model(config.model, config.revision, config.cache_dir)
    measure_and_show(_measure(config, options, model), _print, as_json=as_json)


def arm_configs(config: UpConfig, options: OffersOptions) -> dict[str, UpConfig]:
    prefill = 1 if options.role == "prefill" else 0
    shared = config.model_dump() | {
        **{"port": 0, "prefill": prefill, "decode": 1, "threads": 1, "num_blocks": options.num_blocks},
        "max_model_len": options.input + options.output_tokens,
    }
    return {"none": UpConfig(**shared), "store": UpConfig(**shared | {"store_memory": options.store_memory})}


def body_of(model: str, prompt: list[int], options: OffersOptions) -> Body:
    """With logprobs a token makes a chunk also where it prints nothing: one token might be no content."""
    more = {"logprobs": 0} if options.output_tokens == 1 else {}
    return completion_body(model, prompt, options.output_tokens, **more)


async def _measure(config: UpConfig, options: OffersOptions, model: Path) -> dict[str, Any]:
    head = {**header("offers"), "served": served(config)}
    vocab_size = load_model_config(model).vocab_size
    listener = ClusterConsole(Console(stderr=True), quiet=True)
    arms = {arm: ArmTurns() for arm in ARMS}
    async with AsyncExitStack() as stack:
        clusters, askers = {}, {}
        for arm, arm_config in arm_configs(config, options).items():
            clusters[arm] = await stack.enter_async_context(running_cluster(arm_config, model, listener))
            askers[arm] = await stack.enter_async_context(Asker(clusters[arm].api_url))
        for turn in range(-1, options.rounds):
            prompts = token_prompts(options.requests, options.input, vocab_size, seed=turn + 1)
            bodies = [body_of(config.model_names[0], prompt, options) for prompt in prompts]
            for arm in reversed(ARMS) if turn % 2 else ARMS:
                into = arms[arm] if turn >= 0 else ArmTurns()
                await _turn(clusters[arm], askers[arm], bodies, options, into)
    return report(head, options, arms)


async def _turn(cluster: Cluster, asker: Asker, bodies: Sequence[Body], options: OffersOptions, into: ArmTurns) -> None:
    """Raises UnavailableError."""
    pids = cluster.supervisor.pids
    worker, store = pids[f"{options.role}-0"], pids.get(STORE)
    before, began = (_cpu_s(worker), _loop_s(worker), _cpu_s(store)), asker.now()
    answers = await in_parallel(bodies, asker.ask, options.concurrency)
    seconds = asker.now() - began
    if errors := {answer.error for answer in answers if answer.error}:
        raise UnavailableError("; ".join(errors))
    after = (_cpu_s(worker), _loop_s(worker), _cpu_s(store))
    into.answers_per_s.append(len(answers) / seconds)
    spent = [1e3 * (b - a) / len(answers) for a, b in zip(before, after, strict=True)]
    for values, value in zip((into.worker_cpu_ms, into.loop_cpu_ms, into.store_cpu_ms), spent, strict=True):
        values.append(value)


def _cpu_s(pid: int | None) -> float:
    if pid is None:
        return 0.0
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def _loop_s(pid: int) -> float:
    """Of the thread that the process began with, on which its event loop runs."""
    return next(t.user_time + t.system_time for t in psutil.Process(pid).threads() if t.id == pid)


def report(head: dict[str, Any], options: OffersOptions, arms: dict[str, ArmTurns]) -> dict[str, Any]:
    pairs = zip(arms["store"].answers_per_s, arms["none"].answers_per_s, strict=True)
    return {
        **head,
        "options": asdict(options),
        "arms": {arm: turns.summary() for arm, turns in arms.items()},
        "store_over_none": asdict(Spread.of([a / b for a, b in pairs], digits=4)),
    }


def _print(result: dict[str, Any]) -> None:
    options = result["options"]
    table = Table(title=f"A {options['role']} worker, median (min-max) of {options['rounds']} turns, CPU their mean")
    for column in ("", "without a store", "with one"):
        table.add_column(column, justify="left" if not column else "right")
    none, store = (result["arms"][arm] for arm in ARMS)
    cells = [Spread(**arm["answers_per_s"]) for arm in (none, store)]
    table.add_row("answers/s", *(f"{c.median:.2f} ({c.min:.2f}-{c.max:.2f})" for c in cells))
    for name, text in _CPU.items():
        table.add_row(f"ms of CPU an answer: {text}", *(f"{arm[name]:.2f}" for arm in (none, store)))
    ratio = Spread(**result["store_over_none"])
    table.add_row("answers, with over without", "", f"{ratio.median:.3f} ({ratio.min:.3f}-{ratio.max:.3f})")
    console = Console()
    console.print(table)
    print_footer(console, result)

"""`tailrace bench overhead`: output tokens a second of a whole server, over those of its engine alone.

One worker that prefills and decodes, with one compute thread and nothing but its core; the gateway and the clients on
the other cores. The engine alone runs in a process of its own on the worker's core. The two take turns at the same
prompts.
"""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tailrace.checkpoint.model_config import load_model_config
from tailrace.cli.bench.load import Asker, RequestTimes, completion_body, in_parallel, token_prompts
from tailrace.cli.bench.report import Percentiles, Spread, header, print_footer, served
from tailrace.cli.bench.run import measure_and_show
from tailrace.cli.cluster import running_cluster
from tailrace.cli.console import ClusterConsole
from tailrace.cli.model import fetch_model
from tailrace.cli.processes import start, tell
from tailrace.config import UpConfig
from tailrace.cores import Machine, available_cores
from tailrace.errors import UnavailableError

Prompts = list[list[int]]


@dataclass(frozen=True, slots=True)
class OverheadOptions:
    streams: int = 32
    input: int = 256
    output: int = 128
    rounds: int = 3
    """Counted, after one that is not."""
    max_num_batched_tokens: int = 512
    overlap: bool = False
    """A second server beside the first, whose worker overlaps its steps."""


@dataclass(slots=True)
class Turns:
    """One entry a round; servers as their clients see them, with what each client of the first saw in `requests`."""

    engine: list[float] = field(default_factory=list)
    server: list[float] = field(default_factory=list)
    overlapped: list[float] = field(default_factory=list)
    requests: list[RequestTimes] = field(default_factory=list)


def run_overhead(config: UpConfig, options: OverheadOptions, *, as_json: bool) -> None:
    """Prints a table, or one JSON object on stdout. Raises ConfigError, ChildFailedError or UnavailableError."""
    measure_and_show(_measure(config, options), _print, as_json=as_json)


async def _measure(config: UpConfig, options: OverheadOptions) -> dict[str, Any]:
    head = {**header("overhead"), "served": served(config)}
    model = fetch_model(config.model, config.revision, config.cache_dir)
    vocab_size = load_model_config(model).vocab_size
    *others, core = available_cores()
    # Of what this process starts, only the workers and the engine are told to keep to another core.
    os.sched_setaffinity(0, others or [core])
    turns = Turns()
    async with AsyncExitStack() as stack:
        engine = stack.enter_context(_engine(model, core, config, options))
        askers = {
            arm: await stack.enter_async_context(_server(_settings(config, options, arm), model, core))
            for arm in (("server", "overlapped") if options.overlap else ("server",))
        }
        for turn in range(-1, options.rounds):
            prompts = list(token_prompts(options.streams, options.input, vocab_size, seed=turn + 1))
            arms = ["engine", *askers]
            for arm in reversed(arms) if turn % 2 else arms:
                if arm == "engine":
                    rate = await _engine_rate(engine, prompts)
                else:
                    rate, requests = await _server_rate(askers[arm], config.model_names[0], prompts, options.output)
                if turn >= 0:
                    getattr(turns, arm).append(rate)
                    turns.requests += requests if arm == "server" else []
    return report(head, options, turns)


def _settings(config: UpConfig, options: OverheadOptions, arm: str) -> UpConfig:
    return config.model_copy(
        update={
            **{"port": 0, "prefill": 0, "decode": 1, "threads": 1},
            **{"max_num_seqs": options.streams, "max_num_batched_tokens": options.max_num_batched_tokens},
            **({"overlap_scheduling": "on" if arm == "overlapped" else "off"} if options.overlap else {}),
        }
    )


@asynccontextmanager
async def _server(config: UpConfig, model: Path, core: int) -> AsyncIterator[Asker]:
    listener = ClusterConsole(Console(stderr=True), quiet=True)
    async with running_cluster(config, model, listener, Machine((core,))) as cluster, Asker(cluster.api_url) as asker:
        yield asker


@contextmanager
def _engine(model: Path, core: int, config: UpConfig, options: OverheadOptions) -> Iterator[subprocess.Popen[str]]:
    loop = {
        **{"max_batch": options.streams, "max_tokens": options.input + options.output},
        **{"dtype": config.dtype, "quantization": config.quantization},
        "max_num_batched_tokens": options.max_num_batched_tokens,
    }
    order = {"model_dir": str(model), "cores": [core], "options": loop, "output_tokens": options.output}
    with start("tailrace.cli.bench.engine_turns") as process:
        try:
            tell(process, order)
            yield process
        finally:
            process.kill()


async def _engine_rate(engine: subprocess.Popen[str], prompts: Prompts) -> float:
    said = await asyncio.to_thread(tell, engine, prompts)
    return float(said["output_tokens"] / said["wall_s"])


async def _server_rate(
    asker: Asker, model: str, prompts: Prompts, output_tokens: int
) -> tuple[float, list[RequestTimes]]:
    """Output tokens, as `usage` counts them, from the first send to the last end. Raises UnavailableError."""
    bodies = [completion_body(model, prompt, output_tokens) for prompt in prompts]
    began = asker.now()
    requests = await in_parallel(bodies, asker.ask, len(bodies))
    seconds = asker.now() - began
    if errors := {request.error for request in requests if request.error}:
        raise UnavailableError("; ".join(errors))
    return sum(request.output_tokens for request in requests) / seconds, requests


def report(head: dict[str, Any], options: OverheadOptions, turns: Turns) -> dict[str, Any]:
    return {
        **head,
        "options": asdict(options),
        "engine_output_tokens_per_s": asdict(Spread.of(turns.engine)),
        "server_output_tokens_per_s": asdict(Spread.of(turns.server)),
        "server_over_engine": _ratio(turns.server, turns.engine),
        **(_overlapped(turns) if turns.overlapped else {}),
        "ttft_ms": asdict(Percentiles.of_ms([request.ttft_s for request in turns.requests])),
        "tpot_ms": asdict(Percentiles.of_ms([request.tpot_s for request in turns.requests])),
    }


def _overlapped(turns: Turns) -> dict[str, Any]:
    return {
        "overlapped_over_engine": _ratio(turns.overlapped, turns.engine),
        "overlapped_over_server": _ratio(turns.overlapped, turns.server),
    }


def _ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
    return asdict(Spread.of([a / b for a, b in zip(above, below, strict=True)], digits=4))


def _print(result: dict[str, Any]) -> None:
    options = result["options"]
    table = Table(title=f"{options['streams']} streams of {options['input']} in, {options['output']} out, one core")
    table.add_column("")
    table.add_column("median (min-max)", justify="right")
    for arm in ("engine", "server"):
        table.add_row(f"{arm}, output tokens/s", str(Spread(**result[f"{arm}_output_tokens_per_s"])))
    for name in ("server over engine", "overlapped over engine", "overlapped over server"):
        if ratio := result.get(name.replace(" ", "_")):
            table.add_row(name, f"{ratio['median']:.3f} ({ratio['min']:.3f}-{ratio['max']:.3f})")
    console = Console()
    console.print(table)
    print_footer(console, result)

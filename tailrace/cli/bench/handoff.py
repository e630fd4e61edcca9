"""`tailrace bench handoff`: what handing a prompt from prefill to decode costs an idle pair.

Two clusters on this machine, one that disaggregates and one that does not, with the same compute threads a worker. They
answer in turn, so that what drifts hits both alike; only ratios of the same run mean anything.
"""

import json
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from tailrace.cli.bench.report import Spread, header, print_footer, served
from tailrace.cli.bench.run import measure_and_show
from tailrace.cli.cluster import Cluster, running_cluster
from tailrace.cli.console import ClusterConsole
from tailrace.cli.model import fetch_model
from tailrace.config import UpConfig
from tailrace.errors import UnavailableError

_MAX_TOKENS = 4
_FIRST_ORDINARY_TOKEN = 1000
"""Below it lie control tokens and single bytes."""


@dataclass(frozen=True, slots=True)
class HandoffOptions:
    prompt_tokens: int = 1024
    rounds: int = 10
    """Counted requests to each arm."""
    warmup: int = 2
    threads: int = 1
    """Compute threads a worker, in both arms."""
    seed: int = 0


@dataclass(slots=True)
class ArmTimes:
    """One entry a request, in seconds. `second`: from send to the second token."""

    first: list[float] = field(default_factory=list)
    second: list[float] = field(default_factory=list)
    transfer: list[float] = field(default_factory=list)
    transfer_bytes: int = 0
    transport: str = ""

    def add(self, arrivals: Sequence[float], usage: dict[str, Any]) -> None:
        parts = usage.get("tailrace", {})
        self.first.append(arrivals[0])
        self.second.append(arrivals[1])
        self.transfer.append(parts.get("transfer_ms", 0.0) / 1e3)
        self.transfer_bytes = parts.get("transfer_bytes", 0)
        self.transport = parts.get("transport", "")

    def summary(self) -> dict[str, Any]:
        return {
            "first_token_ms": asdict(Spread.of_ms(self.first)),
            "second_token_ms": asdict(Spread.of_ms(self.second)),
            "transfer_ms": asdict(Spread.of_ms(self.transfer)),
            "transfer_bytes": self.transfer_bytes,
            "transport": self.transport,
        }


def run_handoff(config: UpConfig, options: HandoffOptions, *, as_json: bool) -> None:
    """Prints a table, or one JSON object on stdout. Raises ConfigError or ChildFailedError when no cluster starts."""
    model = fetch_model(config.model, config.revision, config.cache_dir)
    measure_and_show(_measure(config, options, model), _print, as_json=as_json)


async def _measure(config: UpConfig, options: HandoffOptions, model: Path) -> dict[str, Any]:
    head = {**header("handoff"), "served": served(config)}
    shared = config.model_copy(update={"port": 0, "threads": options.threads, "prefix_caching": False})
    listener = ClusterConsole(Console(stderr=True), quiet=True)
    rng = random.Random(options.seed)  # noqa: S311 - test data
    arms = {"pd": ArmTimes(), "colocated": ArmTimes()}
    async with AsyncExitStack() as stack:
        clusters: dict[str, Cluster] = {}
        for arm, prefill in (("pd", 1), ("colocated", 0)):
            arm_config = shared.model_copy(update={"prefill": prefill, "decode": 1})
            clusters[arm] = await stack.enter_async_context(running_cluster(arm_config, model, listener))
        http = await stack.enter_async_context(httpx.AsyncClient(trust_env=False, timeout=600.0))
        for turn in range(options.warmup + options.rounds):
            for arm in sorted(arms, reverse=turn % 2 == 0):
                prompt = [rng.randrange(_FIRST_ORDINARY_TOKEN, 40_000) for _ in range(options.prompt_tokens)]
                arrivals, usage = await _ask(http, clusters[arm].api_url, config.model_names[0], prompt)
                if turn >= options.warmup:
                    arms[arm].add(arrivals, usage)
    return _report(head, options, arms)


async def _ask(http: httpx.AsyncClient, url: str, model: str, prompt: list[int]) -> tuple[list[float], dict[str, Any]]:
    """Seconds from send to each token, and the usage."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": _MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    arrivals: list[float] = []
    usage: dict[str, Any] = {}
    began = time.perf_counter()
    async with http.stream("POST", f"{url}/completions", json=body) as response:
        if response.status_code != httpx.codes.OK:
            raise UnavailableError(f"{url}: {(await response.aread()).decode(errors='replace')}")
        async for line in response.aiter_lines():
            now = time.perf_counter() - began
            event = json.loads(line[6:]) if line.startswith("data: {") else {}
            usage = event.get("usage") or usage
            # With logprobs every token is told of, also one that prints nothing yet.
            for choice in event.get("choices", ()):
                arrivals += [now] * len((choice.get("logprobs") or {}).get("tokens", ()))
    if len(arrivals) < 2:
        raise UnavailableError(f"{url} sent {len(arrivals)} tokens of {_MAX_TOKENS}")
    return arrivals, usage


def _report(head: dict[str, Any], options: HandoffOptions, arms: dict[str, ArmTimes]) -> dict[str, Any]:
    def ratio(name: str) -> float:
        pd, colocated = (statistics.median(getattr(arms[arm], name)) for arm in ("pd", "colocated"))
        return round(float(pd / colocated), 4)

    return {
        **head,
        "options": asdict(options),
        "pd": arms["pd"].summary(),
        "colocated": arms["colocated"].summary(),
        "first_token_ratio": ratio("first"),
        "second_token_ratio": ratio("second"),
    }


def _print(result: dict[str, Any]) -> None:
    options = result["options"]
    table = Table(title=f"{options['prompt_tokens']} tokens, {options['threads']} threads a worker, idle pair")
    for column in ("", "P/D", "colocated", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    for name in ("first", "second"):
        cells = [str(Spread(**result[arm][f"{name}_token_ms"])) for arm in ("pd", "colocated")]
        table.add_row(f"{name} token, ms: median (min-max)", *cells, f"{result[f'{name}_token_ratio']:.3f}")
    pd = result["pd"]
    table.add_row(f"transfer over {pd['transport'] or '-'}, ms", str(Spread(**pd["transfer_ms"])), "", "")
    console = Console()
    console.print(table)
    print_footer(console, result)

"""`tailrace bench serve`: what a server that is asked by many gives to each: TTFT, TPOT, ICL, goodput, errors."""

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from tailrace.checkpoint.model_config import load_model_config
from tailrace.cli.bench.load import Asker, RequestTimes, at_rate, completion_body, in_parallel, token_prompts
from tailrace.cli.bench.report import Percentiles, header, print_footer, served
from tailrace.cli.bench.run import measure_and_show
from tailrace.cli.cluster import running_cluster
from tailrace.cli.console import ClusterConsole
from tailrace.cli.model import fetch_model
from tailrace.config import UpConfig
from tailrace.errors import ConfigError

_WARMUP_REQUESTS = 2


@dataclass(frozen=True, slots=True)
class Slo:
    """Milliseconds; None: any will do."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    icl_ms: float | None = None
    """Of the longest gap of a request."""

    @property
    def is_set(self) -> bool:
        return any(limit is not None for limit in (self.ttft_ms, self.tpot_ms, self.icl_ms))

    def is_met(self, times: RequestTimes) -> bool:
        pairs = (
            (self.ttft_ms, times.ttft_s),
            (self.tpot_ms, times.tpot_s),
            (self.icl_ms, max(times.gaps_s, default=0.0)),
        )
        return all(limit is None or seconds * 1e3 <= limit for limit, seconds in pairs)


@dataclass(frozen=True, slots=True)
class ServeOptions:
    url: str = ""
    """With /v1; empty: a cluster of its own."""
    concurrency: int | None = None
    request_rate: float | None = None
    """Requests a second, Poisson. One of the two."""
    num_requests: int = 64
    input_tokens: int = 128
    output_tokens: int = 64
    vocab_size: int = 32_000
    """Prompts are drawn below it when `url` is given; else the model says."""
    slo: Slo = Slo()
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.request_rate is None):
            raise ConfigError("one of concurrency and request_rate must be given", param="concurrency")


def run_serve(config: UpConfig, options: ServeOptions, *, as_json: bool) -> None:
    """Prints a table, or one JSON object on stdout. Raises ConfigError, ChildFailedError or UnavailableError."""
    measure_and_show(measure(config, options), _print, as_json=as_json)


async def measure(config: UpConfig, options: ServeOptions) -> dict[str, Any]:
    head = header("serve")
    async with _server(config, options) as (url, vocab_size), Asker(url) as asker:
        model = await asker.model()
        prompts = token_prompts(
            options.num_requests + _WARMUP_REQUESTS, options.input_tokens, vocab_size, seed=options.seed
        )
        bodies = [completion_body(model, prompt, options.output_tokens) for prompt in prompts]
        for body in bodies[:_WARMUP_REQUESTS]:
            await asker.ask(body)
        counted = bodies[_WARMUP_REQUESTS:]
        began = asker.now()
        if options.concurrency is not None:
            requests = await in_parallel(counted, asker.ask, options.concurrency)
        else:
            requests = await at_rate(counted, asker.ask, options.request_rate or 1.0, seed=options.seed)
        duration_s = asker.now() - began
    return {
        **head,
        "options": asdict(options),
        "served": None if options.url else served(config),
        "cluster": None
        if options.url
        else {"prefill": config.prefill, "decode": config.decode, "threads": config.threads},
        **summarize(requests, duration_s, options.slo),
    }


@asynccontextmanager
async def _server(config: UpConfig, options: ServeOptions) -> AsyncIterator[tuple[str, int]]:
    """(API, size of the vocabulary)"""
    if options.url:
        yield options.url, options.vocab_size
        return
    model = fetch_model(config.model, config.revision, config.cache_dir)
    async with running_cluster(config, model, ClusterConsole(Console(stderr=True), quiet=True)) as cluster:
        yield cluster.api_url, load_model_config(model).vocab_size


def summarize(requests: Sequence[RequestTimes], duration_s: float, slo: Slo) -> dict[str, Any]:
    """Rates count whole requests only; tokens are those that `usage` names."""
    good = [request for request in requests if not request.error]
    output_tokens = sum(request.output_tokens for request in good)
    return {
        "duration_s": round(duration_s, 3),
        "num_ok": len(good),
        "errors": dict(Counter(request.error for request in requests if request.error)),
        "requests_per_s": round(len(good) / duration_s, 3),
        "output_tokens": output_tokens,
        "output_tokens_per_s": round(output_tokens / duration_s, 2),
        "prompt_tokens_per_s": round(sum(request.prompt_tokens for request in good) / duration_s, 2),
        "ttft_ms": asdict(Percentiles.of_ms([request.ttft_s for request in good])),
        "tpot_ms": asdict(Percentiles.of_ms([request.tpot_s for request in good if request.output_tokens > 1])),
        "icl_ms": asdict(Percentiles.of_ms([gap for request in good for gap in request.gaps_s])),
        "goodput_requests_per_s": round(sum(map(slo.is_met, good)) / duration_s, 3) if slo.is_set else None,
    }


def _print(result: dict[str, Any]) -> None:
    options = result["options"]
    title = f"{options['num_requests']} requests of {options['input_tokens']} in, {options['output_tokens']} out"
    table = Table("", "p50 / p90 / p99", title=title)
    table.columns[1].justify = "right"
    for name in ("ttft", "tpot", "icl"):
        table.add_row(f"{name.upper()}, ms", str(Percentiles(**result[f"{name}_ms"])))
    table.add_row("requests/s", f"{result['requests_per_s']:.2f}")
    if result["goodput_requests_per_s"] is not None:
        table.add_row("goodput, requests/s within all SLOs", f"{result['goodput_requests_per_s']:.2f}")
    table.add_row("output tokens/s", f"{result['output_tokens_per_s']:.1f}")
    table.add_row("errors", str(sum(result["errors"].values())))
    console = Console()
    console.print(table)
    for message, count in result["errors"].items():
        console.print(f"{count} x {message}", markup=False)
    print_footer(console, result)

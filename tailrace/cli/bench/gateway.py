"""`tailrace bench gateway`: what the gateway's process spends on a token, everything included.

A real gateway and, in turn with it, a plain FastAPI server: the same streams at the same pace, read from one worker
process that has no engine.
"""

import asyncio
import os
import secrets
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from tailrace.cli.bench.load import Asker, RequestTimes, completion_body
from tailrace.cli.bench.report import Percentiles, Spread, header, print_footer
from tailrace.cli.bench.run import measure_and_show
from tailrace.cli.cluster import free_port
from tailrace.cli.console import ClusterConsole
from tailrace.cli.model import fetch_model
from tailrace.cli.supervisor import ChildSpec, RestartPolicy, Supervisor
from tailrace.config import DEFAULT_MODEL, GatewayConfig, WorkerConfig, base_environment
from tailrace.errors import UnavailableError

ARMS = ("gateway", "plain")
_PACKAGES = ("tailrace", "grpcio", "fastapi", "uvicorn", "pydantic")
_WARMUP_S = 2.0
_TEXT = (
    "A tailrace carries the water away from the wheel, so that what has done its work does not stand in the way of "
    "what has still to come. Keep it clear and the mill runs; let it silt up and every wheel above it slows down. "
)


@dataclass(frozen=True, slots=True)
class GatewayBenchOptions:
    model: str = DEFAULT_MODEL
    streams: int = 32
    tokens_per_s: float = 50.0
    """Of each stream."""
    seconds: float = 10.0
    """Of one turn of one arm."""
    rounds: int = 3


@dataclass(slots=True)
class ArmCosts:
    """One entry a round."""

    cpu_us_per_token: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    chunks_per_token: list[float] = field(default_factory=list)
    """Below 1: tokens of several steps came as one."""
    gaps: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        return {
            "cpu_us_per_token": asdict(Spread.of(self.cpu_us_per_token)),
            "tokens_per_s": asdict(Spread.of(self.tokens_per_s, digits=1)),
            "chunks_per_token": asdict(Spread.of(self.chunks_per_token, digits=3)),
            "icl_ms": asdict(Percentiles.of_ms(self.gaps)),
        }


def run_gateway(options: GatewayBenchOptions, *, as_json: bool) -> None:
    """Prints a table, or one JSON object on stdout. Raises ChildFailedError when a process does not start."""
    model = fetch_model(options.model)
    measure_and_show(_measure(options, model), _print, as_json=as_json)


async def _measure(options: GatewayBenchOptions, model: Path) -> dict[str, Any]:
    head = header("gateway", packages=_PACKAGES)
    ports = {name: free_port("127.0.0.1") for name in ("worker", *ARMS)}
    specs = plan_children(options, model, ports, secret=secrets.token_hex(32))
    costs = {arm: ArmCosts() for arm in ARMS}
    listener = ClusterConsole(Console(stderr=True), quiet=True)
    async with Supervisor(specs, listener, RestartPolicy(enabled=False)) as supervisor:
        await supervisor.during(_until_ready([ports[arm] for arm in ARMS]))
        for arm in ARMS:
            await _turn(options, ports[arm], supervisor.pids[arm], ArmCosts(), _WARMUP_S)
        for turn in range(options.rounds):
            for arm in ARMS[turn % 2 :] + ARMS[: turn % 2]:
                await _turn(options, ports[arm], supervisor.pids[arm], costs[arm], options.seconds)
    medians = [statistics.median(costs[arm].cpu_us_per_token) for arm in ARMS]
    return {
        **head,
        "options": asdict(options),
        **{arm: costs[arm].summary() for arm in ARMS},
        "gateway_over_plain": round(medians[0] / medians[1], 3),
    }


def plan_children(
    options: GatewayBenchOptions, model: Path, ports: Mapping[str, int], *, secret: str
) -> tuple[ChildSpec, ...]:
    """The worker without an engine, the gateway, and the plain server."""
    shared: dict[str, Any] = {
        "model": str(model),
        "served_model_name": ("bench",),
        "secret": secret,
        "parent_pid": os.getpid(),
    }
    address = f"127.0.0.1:{ports['worker']}"
    worker = WorkerConfig(**shared, port=ports["worker"], max_num_seqs=4096, log_level="warning")
    gateway = GatewayConfig(**shared, port=ports["gateway"], workers=(address,), log_level="warning")
    text = Tokenizer.from_file(str(model / "tokenizer.json")).encode(_TEXT).ids
    fake = ("tailrace.cli.bench.fake_worker", str(options.tokens_per_s), ",".join(map(str, text)))
    plain = ("tailrace.cli.bench.plain_server", str(ports["plain"]), address)
    return (
        _child("worker", fake, worker.to_environment()),
        _child("gateway", ("services.gateway.main",), gateway.to_environment()),
        _child("plain", plain, worker.to_environment()),
    )


def _child(name: str, module: tuple[str, ...], environment: dict[str, str]) -> ChildSpec:
    calm = {"PYTHONUNBUFFERED": "1", "GRPC_VERBOSITY": "ERROR"}
    return ChildSpec(name, (sys.executable, "-m", *module), {**calm, **base_environment(), **environment})


async def _until_ready(ports: list[int]) -> None:
    async with httpx.AsyncClient(trust_env=False, timeout=5.0) as http:
        for port in ports:
            while not await _is_ready(http, port):  # noqa: ASYNC110 - another process: nothing here to wait on
                await asyncio.sleep(0.1)


async def _is_ready(http: httpx.AsyncClient, port: int) -> bool:
    try:
        return (await http.get(f"http://127.0.0.1:{port}/ready")).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


async def _turn(options: GatewayBenchOptions, port: int, pid: int, into: ArmCosts, seconds: float) -> None:
    """From before the first request is sent until the last one is answered. Raises UnavailableError when one fails."""
    num_tokens = max(2, round(seconds * options.tokens_per_s))
    body = completion_body("bench", _TEXT, num_tokens)
    async with Asker(f"http://127.0.0.1:{port}/v1") as asker:
        before, began = cpu_seconds(pid), asker.now()
        answers = await asyncio.gather(*(asker.ask(body) for _ in range(options.streams)))
        spent, took = cpu_seconds(pid) - before, asker.now() - began
    count = count_tokens(answers, num_tokens)
    into.cpu_us_per_token.append(spent / count * 1e6)
    into.tokens_per_s.append(count / took)
    into.chunks_per_token.append(sum(len(answer.chunks_at) for answer in answers) / count)
    into.gaps += [gap for answer in answers for gap in answer.gaps_s]


def count_tokens(answers: list[RequestTimes], expected: int) -> int:
    """Raises UnavailableError when an answer failed, or has not as many tokens as were asked for."""
    for answer in answers:
        if answer.error or answer.output_tokens != expected:
            raise UnavailableError(f"{answer.output_tokens} of {expected} tokens: {answer.error or 'ended early'}")
    return expected * len(answers)


def cpu_seconds(pid: int) -> float:
    """Of all its threads, those that have ended too, in the program and in the kernel for it."""
    # What clock_getcpuclockid(3) makes of a process: in nanoseconds, where /proc has hundredths of a second.
    return time.clock_gettime(~pid << 3 | 2)


def _print(result: dict[str, Any]) -> None:
    options = result["options"]
    title = f"{options['streams']} streams of {options['tokens_per_s']:g} tokens/s"
    table = Table("", "CPU a token, us: median (min-max)", "tokens/s", "ICL, ms: p50 / p90 / p99", title=title)
    for arm in ARMS:
        said = result[arm]
        rates = (str(Spread(**said[name])) for name in ("cpu_us_per_token", "tokens_per_s"))
        table.add_row(arm, *rates, str(Percentiles(**said["icl_ms"])))
    console = Console()
    console.print(table)
    console.print(f"gateway over FastAPI + pydantic: {result['gateway_over_plain']:.2f}")
    print_footer(console, result)

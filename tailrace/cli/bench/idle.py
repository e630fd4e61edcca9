"""`tailrace bench idle`: what a cluster with nothing to do costs, in cores.

One gateway, one prefill and one decode worker. They have met and handed a prompt over, and then wait.
"""

import asyncio
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from tailrace.checkpoint.model_config import load_model_config
from tailrace.cli.bench.load import Asker, completion_body, token_prompts
from tailrace.cli.bench.report import header, print_footer
from tailrace.cli.bench.run import measure_and_show
from tailrace.cli.cluster import running_cluster
from tailrace.cli.console import ClusterConsole
from tailrace.cli.model import fetch_model
from tailrace.config import UpConfig
from tailrace.errors import UnavailableError

_PROMPT_TOKENS, _OUTPUT_TOKENS, _NUM_PROMPTS = 256, 8, 4
_SUPERVISOR = "supervisor"


@dataclass(frozen=True, slots=True)
class IdleOptions:
    seconds: float = 20.0
    settle_s: float = 8.0
    """Before: an owner drives nixl's progress for five seconds after it was met, and clients' connections close."""


@dataclass(frozen=True, slots=True)
class Usage:
    cpu_s: float
    wakeups: int
    """Times that a thread of the process was put on a core, of its own accord or after it was taken off."""


def run_idle(config: UpConfig, options: IdleOptions, *, as_json: bool) -> None:
    """Prints a table, or one JSON object on stdout. Raises ConfigError, ChildFailedError or UnavailableError."""
    measure_and_show(_measure(config, options), _print, as_json=as_json)


async def _measure(config: UpConfig, options: IdleOptions) -> dict[str, Any]:
    head = header("idle")
    model = fetch_model(config.model, config.revision, config.cache_dir)
    idle = config.model_copy(update={"port": 0, "prefill": 1, "decode": 1})
    async with running_cluster(idle, model, ClusterConsole(Console(stderr=True), quiet=True)) as cluster:
        prompts = token_prompts(_NUM_PROMPTS, _PROMPT_TOKENS, load_model_config(model).vocab_size, seed=0)
        async with Asker(cluster.api_url) as asker:
            for prompt in prompts:
                answer = await asker.ask(completion_body(config.model_names[0], prompt, _OUTPUT_TOKENS))
                if answer.error:
                    raise UnavailableError(answer.error)
        await asyncio.sleep(options.settle_s)
        before, began = _usages(cluster.supervisor.pids), time.monotonic()
        await asyncio.sleep(options.seconds)
        after, seconds = _usages(cluster.supervisor.pids), time.monotonic() - began
    return report(head, options, before, after, seconds)


def _usages(pids: Mapping[str, int]) -> dict[str, Usage]:
    return {name: _usage(pid) for name, pid in {**pids, _SUPERVISOR: os.getpid()}.items()}


def _usage(pid: int) -> Usage:
    process = psutil.Process(pid)
    times = process.cpu_times()
    threads = (psutil.Process(thread.id) for thread in process.threads())
    switches = (thread.num_ctx_switches() for thread in threads)
    return Usage(times.user + times.system, sum(count.voluntary + count.involuntary for count in switches))


def report(
    head: dict[str, Any], options: IdleOptions, before: dict[str, Usage], after: dict[str, Usage], seconds: float
) -> dict[str, Any]:
    """`cores` is of the gateway and the workers; who started them is shown, and not in it."""
    processes = {
        name: {
            "cores": round((after[name].cpu_s - before[name].cpu_s) / seconds, 5),
            "wakeups_per_s": round((after[name].wakeups - before[name].wakeups) / seconds, 2),
        }
        for name in after
    }
    cores = sum(said["cores"] for name, said in processes.items() if name != _SUPERVISOR)
    return {**head, "options": asdict(options), "cores": round(cores, 5), "processes": processes}


def _print(result: dict[str, Any]) -> None:
    table = Table("", "cores", "wakeups/s", title="An idle cluster")
    for name, said in result["processes"].items():
        table.add_row(name, f"{said['cores']:.4f}", f"{said['wakeups_per_s']:.1f}")
    table.add_row("gateway and workers", f"{result['cores']:.4f}", "")
    console = Console()
    console.print(table)
    print_footer(console, result)

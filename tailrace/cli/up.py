"""`tailrace up`: serve until Ctrl-C."""

import asyncio
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from rich.console import Console

from tailrace.cli.cluster import free_port, running_cluster
from tailrace.cli.console import ClusterConsole
from tailrace.cli.machine_checks import Verdict, core_finding
from tailrace.cli.model import fetch_model
from tailrace.config import UpConfig
from tailrace.cores import this_machine

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def up(config: UpConfig) -> None:
    """Returns after a clean stop. Raises ConfigError, CheckpointError or ChildFailedError when it cannot serve."""
    console = Console(highlight=False)
    free_port(config.host, config.port)  # nobody should wait for a download to learn that the port is taken
    model = fetch_model(config.model, config.revision, config.cache_dir)
    asyncio.run(until_signalled(_serve(config, model, console)))


async def until_signalled(work: Coroutine[Any, Any, None]) -> None:
    """Run `work` until it ends or a signal cancels it; a second signal cancels its clean-up, which then kills."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        if not task.cancelled():
            raise


async def _serve(config: UpConfig, model: Path, console: Console) -> None:
    console.print(f"Starting {describe(config)}; Ctrl-C stops it")
    cores = core_finding(config, this_machine())
    if cores.verdict is Verdict.WARN:
        console.print(f"[yellow]{cores.what}: {cores.detail}[/yellow]", soft_wrap=True)
    async with running_cluster(config, model, ClusterConsole(console)) as cluster:
        console.print(
            f"[bold]Ready in {cluster.started_in_s:.1f} s: {cluster.api_url}[/bold] ({config.model_names[0]})"
        )
        await cluster.supervisor.during(asyncio.Event().wait())


def describe(config: UpConfig) -> str:
    workers = f"{config.decode} decode" if config.prefill == 0 else f"{config.prefill} prefill, {config.decode} decode"
    return f"1 gateway, {workers}{', 1 store' if config.has_store else ''}"

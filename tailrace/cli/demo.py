"""`tailrace demo`: a cluster, one question, its answer, and where the time went."""

import asyncio
import time
from pathlib import Path

import psutil
from rich.console import Console

from tailrace.cli.chat import print_answer
from tailrace.cli.cluster import Cluster, running_cluster
from tailrace.cli.console import ClusterConsole
from tailrace.cli.figures import breakdown_table
from tailrace.cli.model import fetch_model
from tailrace.cli.openai_stream import ChatClient, ChatOptions, Message
from tailrace.cli.up import describe, until_signalled
from tailrace.config import UpConfig

QUESTION = "Why is the sky blue? Explain it to a child in three sentences."
_MAX_TOKENS = 96


def demo(config: UpConfig) -> None:
    """Raises ConfigError, CheckpointError or ChildFailedError when the cluster cannot serve."""
    model = fetch_model(config.model, config.revision, config.cache_dir)
    asyncio.run(until_signalled(_demo(config, model, Console(highlight=False))))


async def _demo(config: UpConfig, model: Path, console: Console) -> None:
    console.print(f"Starting {describe(config)} with {config.model_names[0]} ...")
    async with running_cluster(config, model, ClusterConsole(console, quiet=True)) as cluster:
        console.print(f"Ready after {cluster.started_in_s:.1f} s at {cluster.api_url}\n")
        await cluster.supervisor.during(_ask(config, cluster, console))


async def _ask(config: UpConfig, cluster: Cluster, console: Console) -> None:
    messages: list[Message] = [{"role": "user", "content": QUESTION}]
    key = config.api_key[0].get_secret_value() if config.api_key else ""
    client = ChatClient(ChatOptions(cluster.api_url, key, config.model_names[0], _MAX_TOKENS, temperature=0.0))
    console.print(f"[bold]> {QUESTION}[/bold]")
    asked_after_s = time.time() - psutil.Process().create_time()
    try:
        _, figures = await print_answer(client, messages)
    finally:
        await client.aclose()
    console.print()
    console.print(breakdown_table(figures))
    console.print(f"\nThe first token came {asked_after_s + figures.ttft_s:.1f} s after this command was started.")

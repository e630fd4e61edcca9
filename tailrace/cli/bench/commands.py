"""The sub-commands of `tailrace bench`. Each imports its benchmark when it runs."""

from typing import Annotated

import typer

from tailrace.cli.options import Settings
from tailrace.config import DEFAULT_MODEL, UpConfig

bench_app = typer.Typer(no_args_is_help=True, help="Measurements on this machine.")


@bench_app.command("handoff")
def bench_handoff(
    model: Annotated[str, typer.Option(help="The model to serve.")] = DEFAULT_MODEL,
    transport: Annotated[str, typer.Option(help="auto, nixl or stream.")] = "auto",
    dtype: Annotated[str, typer.Option(help="As for `tailrace up`.")] = "auto",
    prompt_tokens: Annotated[int, typer.Option(min=2, max=100_000)] = 1024,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Counted requests to each arm.")] = 10,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Compute threads a worker, in both arms.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """First and second token of an idle pair that hands KV over, against one worker that does both."""
    from tailrace.cli.bench.handoff import HandoffOptions, run_handoff

    settings: Settings = {"model": model, "transport": transport, "dtype": dtype}
    config = UpConfig(**settings, port=0, log_level="warning")
    options = HandoffOptions(prompt_tokens=prompt_tokens, rounds=rounds, threads=threads)
    run_handoff(config, options, as_json=as_json)

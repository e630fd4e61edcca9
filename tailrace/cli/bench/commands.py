"""The sub-commands of `tailrace bench`. Each imports its benchmark when it runs."""

from typing import Annotated

import typer

from tailrace.cli.options import Settings
from tailrace.config import DEFAULT_MODEL, UpConfig

bench_app = typer.Typer(no_args_is_help=True, help="Measurements on this machine.")

Model = Annotated[str, typer.Option(help="A directory, a built-in name, or org/name on the Hugging Face hub.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


@bench_app.command("handoff")
def bench_handoff(
    model: Model = DEFAULT_MODEL,
    transport: Annotated[str, typer.Option(help="auto, nixl or stream.")] = "auto",
    dtype: Annotated[str, typer.Option(help="As for `tailrace up`.")] = "auto",
    prompt_tokens: Annotated[int, typer.Option(min=2, max=100_000)] = 1024,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Counted requests to each arm.")] = 10,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Compute threads a worker, in both arms.")] = 1,
    as_json: AsJson = False,
) -> None:
    """First and second token of an idle pair that hands KV over, against one worker that does both."""
    from tailrace.cli.bench.handoff import HandoffOptions, run_handoff

    settings: Settings = {"model": model, "transport": transport, "dtype": dtype}
    config = UpConfig(**settings, port=0, log_level="warning")
    options = HandoffOptions(prompt_tokens=prompt_tokens, rounds=rounds, threads=threads)
    run_handoff(config, options, as_json=as_json)


@bench_app.command("engine")
def bench_engine(
    model: Model = DEFAULT_MODEL,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Sequences, all at once.")] = 16,
    input_tokens: Annotated[int, typer.Option("--input", min=1, max=1_000_000, help="Prompt tokens each.")] = 128,
    output_tokens: Annotated[int, typer.Option("--output", min=1, max=1_000_000, help="Output tokens each.")] = 64,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Compute threads.")] = 1,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    load_format: Annotated[str, typer.Option(help="auto, or dummy: random weights of the right shapes.")] = "auto",
    max_num_batched_tokens: Annotated[int, typer.Option(min=16, max=1 << 20, help="Tokens of one step.")] = 512,
    runs: Annotated[int, typer.Option(min=1, max=100, help="Counted runs after the warm-up; the best counts.")] = 3,
    as_json: AsJson = False,
) -> None:
    """The engine alone, in this process, prefix cache off: tokens a second, step times, MBU and MFU."""
    from tailrace.cli.bench.engine import EngineBenchOptions, run_engine

    options = EngineBenchOptions(
        model=model,
        batch=batch,
        input=input_tokens,
        output=output_tokens,
        threads=threads,
        dtype=dtype,
        load_format=load_format,
        max_num_batched_tokens=max_num_batched_tokens,
        runs=runs,
    )
    run_engine(options, as_json=as_json)

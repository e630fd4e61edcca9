"""The flags of `tailrace simulate`."""

from pathlib import Path
from typing import Annotated

import typer

Trace = Annotated[Path | None, typer.Option(help="Requests in Mooncake's format, a JSON object a line.")]
Kind = Annotated[str, typer.Option(help="Without a trace: shared-prefix, chat or sharegpt.")]
Blocks = Annotated[int | None, typer.Option(min=0, max=10_000_000, help="Of a worker's node; default: the profile's.")]


def simulate(
    trace: Trace = None,
    workload: Kind = "chat",
    num_requests: Annotated[int, typer.Option(min=1, max=5_000_000, help="Of a generated workload.")] = 10_000,
    workers: Annotated[int, typer.Option(min=1, max=1024, help="Prefill workers.")] = 8,
    decode: Annotated[int | None, typer.Option(min=1, max=1024, help="Decode workers; default: unlimited.")] = None,
    blocks_per_worker: Annotated[int, typer.Option(min=1, max=10_000_000, help="KV blocks of each.")] = 20_000,
    decode_blocks: Annotated[
        int | None, typer.Option(min=1, max=10_000_000, help="KV blocks of each decode worker; default: the same.")
    ] = None,
    block_tokens: Annotated[int, typer.Option(min=1, max=65_536, help="Of a block; a trace has its own.")] = 512,
    policy: Annotated[str, typer.Option(help="cost, round-robin, least-loaded or prefix.")] = "cost",
    load: Annotated[
        float,
        typer.Option(min=0.001, max=1000, help="Prefill seconds of all prompts, uncached, over the workers' time."),
    ] = 0.7,
    seed: Annotated[int, typer.Option(help="Of a generated workload.")] = 0,
    profile: Annotated[str, typer.Option(help="h100 or h200 with Llama-3.1-8B, cpu with SmolLM2-135M.")] = "h100",
    link_gbit: Annotated[
        float | None, typer.Option(min=0.001, max=1e6, help="Gb/s between workers; default: the profile's.")
    ] = None,
    fetch: Annotated[bool, typer.Option("--fetch/--no-fetch", help="From other workers and from stores.")] = True,
    cpu_blocks: Blocks = None,
    nvme_blocks: Blocks = None,
    stepwise: Annotated[
        bool, typer.Option("--stepwise", help="An event for each decode step (slow, same result).")
    ] = False,
    slo_ttft_ms: Annotated[float | None, typer.Option(min=0, help="Goodput counts requests within all SLOs.")] = None,
    slo_tpot_ms: Annotated[float | None, typer.Option(min=0)] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw it, too (extra: tailrace[plot]).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """A cluster under virtual time: the product's own routing, pools and index, on a trace or a generated workload."""
    from tailrace.cli.simulate import SimulateOptions, run_simulate
    from tailrace.sim.result import Slo

    options = SimulateOptions(
        trace=trace,
        workload=workload,
        num_requests=num_requests,
        seed=seed,
        block_tokens=block_tokens,
        load=load,
        workers=workers,
        decode=decode,
        blocks_per_worker=blocks_per_worker,
        decode_blocks=decode_blocks,
        policy=policy,
        profile=profile,
        link_gbit_per_s=link_gbit,
        fetch=fetch,
        cpu_blocks=cpu_blocks,
        nvme_blocks=nvme_blocks,
        stepwise=stepwise,
        slo=Slo(_seconds(slo_ttft_ms), _seconds(slo_tpot_ms)),
        plot=plot,
    )
    run_simulate(options, as_json=as_json)


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3

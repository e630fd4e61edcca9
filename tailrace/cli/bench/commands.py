"""The sub-commands of `tailrace bench`. Each imports its benchmark when it runs."""

from pathlib import Path
from typing import Annotated

import typer

from tailrace.cli.options import Settings
from tailrace.config import DEFAULT_MODEL, UpConfig
from tailrace.errors import ConfigError

bench_app = typer.Typer(no_args_is_help=True, help="Measurements on this machine.")

Model = Annotated[str, typer.Option(help="A directory, a built-in name, or org/name on the Hugging Face hub.")]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")]
Quantization = Annotated[str, typer.Option(help="none or int8, of the weights.")]
Transport = Annotated[str, typer.Option(help="auto, nixl or stream.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


@bench_app.command("handoff")
def bench_handoff(
    model: Model = DEFAULT_MODEL,
    transport: Transport = "auto",
    dtype: Dtype = "auto",
    quantization: Quantization = "none",
    prompt_tokens: Annotated[int, typer.Option(min=2, max=100_000)] = 1024,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Counted requests to each arm.")] = 10,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Compute threads a worker, in both arms.")] = 1,
    as_json: AsJson = False,
) -> None:
    """First and second token of an idle pair that hands KV over, against one worker that does both."""
    from tailrace.cli.bench.handoff import HandoffOptions, run_handoff

    options = HandoffOptions(prompt_tokens=prompt_tokens, rounds=rounds, threads=threads)
    settings = {"model": model, "transport": transport, "dtype": dtype, "quantization": quantization}
    run_handoff(_quiet(settings), options, as_json=as_json)


@bench_app.command("transfer")
def bench_transfer(
    transport: Transport = "auto",
    blocks: Annotated[int, typer.Option(min=1, max=100_000, help="Of one pull.")] = 64,
    block_bytes: Annotated[
        int, typer.Option(min=64, max=1 << 30, help="Default: 16 tokens of SmolLM2-135M.")
    ] = 368_640,
    ranges: Annotated[int, typer.Option(min=1, max=1000, help="Sets of blocks that take turns.")] = 12,
    rounds: Annotated[int, typer.Option(min=1, max=10_000)] = 20,
    as_json: AsJson = False,
) -> None:
    """A pull beside its own limit: over nixl beside memcpy by one thread, over a stream beside a bare socket loop."""
    from tailrace.cli.bench.transfer import TransferBenchOptions, run_transfer

    options = TransferBenchOptions(num_blocks=blocks, block_bytes=block_bytes, rounds=rounds, num_ranges=ranges)
    run_transfer(_quiet({"transport": transport}), options, as_json=as_json)


@bench_app.command("tiers")
def bench_tiers(
    directory: Annotated[str, typer.Option(help="Where the files are made; default: that of temporary files.")] = "",
    block_bytes: Annotated[str, typer.Option(help="Sizes, with commas between.")] = "65536,368640,1048576",
    total_mib: Annotated[int, typer.Option(min=1, max=1 << 20, help="Moved in each turn; at least 256 blocks.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, max=1000)] = 5,
    requests: Annotated[int, typer.Option(min=1, max=1_000_000, help="Of each access pattern.")] = 2000,
    as_json: AsJson = False,
) -> None:
    """The store's memory tier beside memcpy, its disk tier beside plain pwrite and pread, and what the disk adds."""
    from tailrace.cli.bench.tier_hits import HitOptions
    from tailrace.cli.bench.tiers import TierOptions, run_tiers

    try:
        sizes = tuple(int(size) for size in block_bytes.split(","))
    except ValueError:
        raise ConfigError(
            f"block-bytes: numbers with commas between, not {block_bytes!r}", param="block_bytes"
        ) from None
    options = TierOptions(directory, sizes, total_mib << 20, rounds)
    run_tiers(options, HitOptions(requests=requests), as_json=as_json)


@bench_app.command("engine")
def bench_engine(
    model: Model = DEFAULT_MODEL,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Sequences, all at once.")] = 16,
    input_tokens: Annotated[int, typer.Option("--input", min=1, max=1_000_000, help="Prompt tokens each.")] = 128,
    output_tokens: Annotated[int, typer.Option("--output", min=1, max=1_000_000, help="Output tokens each.")] = 64,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Compute threads.")] = 1,
    dtype: Dtype = "auto",
    quantization: Quantization = "none",
    load_format: Annotated[str, typer.Option(help="auto, or dummy: random weights of the right shapes.")] = "auto",
    max_num_batched_tokens: Annotated[int, typer.Option(min=16, max=1 << 20, help="Tokens of one step.")] = 512,
    runs: Annotated[int, typer.Option(min=1, max=100, help="Counted runs after the warm-up; the best counts.")] = 3,
    overlap: Annotated[bool, typer.Option("--overlap", help="Each run once more with overlapped steps.")] = False,
    phases: Annotated[bool, typer.Option("--phases", help="Show where the time of a step goes.")] = False,
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
        quantization=quantization,
        load_format=load_format,
        max_num_batched_tokens=max_num_batched_tokens,
        runs=runs,
        overlap=overlap,
        phases=phases,
    )
    run_engine(options, as_json=as_json)


@bench_app.command("accuracy")
def bench_accuracy(
    model: Model = DEFAULT_MODEL,
    dtype: Annotated[
        str, typer.Option(help="Of the arms beside float32: auto, bfloat16, float16 or float32.")
    ] = "auto",
    tokens: Annotated[int, typer.Option(min=2, max=1 << 20, help="Of the shipped text, at most.")] = 1 << 20,
    window: Annotated[int, typer.Option(min=2, max=1 << 20, help="Tokens that are seen together.")] = 1024,
    output_tokens: Annotated[int, typer.Option("--output", min=1, max=4096, help="Greedy tokens a prompt.")] = 64,
    threads: Annotated[int, typer.Option(min=0, max=1024, help="Compute threads; 0: as many as cores.")] = 0,
    as_json: AsJson = False,
) -> None:
    """What int8 weights cost: perplexity and agreement on a shipped text, beside the model's dtype and float32."""
    from tailrace.cli.bench.accuracy import AccuracyOptions, run_accuracy

    options = AccuracyOptions(
        model=model, dtype=dtype, tokens=tokens, window=window, output=output_tokens, threads=threads
    )
    run_accuracy(options, as_json=as_json)


@bench_app.command("serve")
def bench_serve(
    url: Annotated[str, typer.Option(help="An OpenAI API, with /v1; else a cluster is started for the time.")] = "",
    prefill: Annotated[int | None, typer.Option(min=0, max=64, help="Prefill workers to start.")] = None,
    decode: Annotated[int | None, typer.Option(min=1, max=64, help="Decode workers to start.")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, max=100_000, help="Requests that are open at once.")] = None,
    request_rate: Annotated[float | None, typer.Option(min=0.001, help="Or: requests a second, Poisson.")] = None,
    num_requests: Annotated[int, typer.Option(min=1, max=1_000_000)] = 64,
    input_tokens: Annotated[int, typer.Option(min=1, max=1_000_000)] = 128,
    output_tokens: Annotated[int, typer.Option(min=1, max=1_000_000)] = 64,
    slo_ttft_ms: Annotated[float | None, typer.Option(min=0, help="Goodput counts requests within all SLOs.")] = None,
    slo_tpot_ms: Annotated[float | None, typer.Option(min=0)] = None,
    slo_icl_ms: Annotated[float | None, typer.Option(min=0, help="Of a request's longest gap.")] = None,
    vocab_size: Annotated[int, typer.Option(min=2, help="With --url: prompts are drawn below it.")] = 32_000,
    model: Model = DEFAULT_MODEL,
    dtype: Dtype = "auto",
    quantization: Quantization = "none",
    transport: Transport = "auto",
    threads: Annotated[int, typer.Option(min=0, max=1024, help="A worker; 0: as many as it has cores.")] = 0,
    as_json: AsJson = False,
) -> None:
    """A server under load: TTFT, TPOT, ICL, goodput and errors; tokens as its `usage` counts them."""
    from tailrace.cli.bench.serve import ServeOptions, Slo, run_serve

    if url and (prefill is not None or decode is not None):
        raise ConfigError("url: a server that runs already, or --prefill and --decode to start one; not both")
    slo = Slo(slo_ttft_ms, slo_tpot_ms, slo_icl_ms)
    options = ServeOptions(
        url=url,
        concurrency=concurrency,
        request_rate=request_rate,
        num_requests=num_requests,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        vocab_size=vocab_size,
        slo=slo,
    )
    workers = {"prefill": 1 if prefill is None else prefill, "decode": decode or 1, "threads": threads}
    settings = {"model": model, "dtype": dtype, "quantization": quantization, "transport": transport, **workers}
    run_serve(_quiet(settings), options, as_json=as_json)


@bench_app.command("overhead")
def bench_overhead(
    model: Model = DEFAULT_MODEL,
    dtype: Dtype = "auto",
    quantization: Quantization = "none",
    streams: Annotated[int, typer.Option(min=1, max=4096, help="Requests that are open at once.")] = 32,
    input_tokens: Annotated[int, typer.Option("--input", min=1, max=1_000_000, help="Prompt tokens each.")] = 256,
    output_tokens: Annotated[int, typer.Option("--output", min=1, max=1_000_000, help="Output tokens each.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Counted turns of each.")] = 3,
    overlap: Annotated[bool, typer.Option("--overlap", help="A second server, with overlapped steps.")] = False,
    as_json: AsJson = False,
) -> None:
    """Output tokens a second of a whole server on one core, over those of its engine alone."""
    from tailrace.cli.bench.overhead import OverheadOptions, run_overhead

    options = OverheadOptions(streams=streams, input=input_tokens, output=output_tokens, rounds=rounds, overlap=overlap)
    run_overhead(_quiet({"model": model, "dtype": dtype, "quantization": quantization}), options, as_json=as_json)


@bench_app.command("interference")
def bench_interference(
    model: Model = DEFAULT_MODEL,
    dtype: Dtype = "auto",
    transport: Transport = "auto",
    decoders: Annotated[int, typer.Option(min=1, max=1024, help="Sequences that decode all the time.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(min=1, max=100_000)] = 1024,
    prompts_per_s: Annotated[float, typer.Option(min=0.01, max=1000)] = 1.2,
    seconds: Annotated[float, typer.Option(min=1, max=3600, help="Of one turn of one arm.")] = 15.0,
    rounds: Annotated[int, typer.Option(min=1, max=100)] = 2,
    chunk_tokens: Annotated[int, typer.Option(min=16, max=1 << 16, help="Of the chunked arm, and of prefill.")] = 512,
    as_json: AsJson = False,
) -> None:
    """Gaps between the tokens of steady decoders while long prompts arrive: colocated whole, in chunks, and P/D."""
    from tailrace.cli.bench.interference import InterferenceOptions, run_interference

    settings = {"model": model, "dtype": dtype, "transport": transport, "max_num_batched_tokens": chunk_tokens}
    options = InterferenceOptions(
        decoders=decoders, prompt_tokens=prompt_tokens, prompts_per_s=prompts_per_s, seconds=seconds, rounds=rounds
    )
    run_interference(_quiet(settings), options, as_json=as_json)


@bench_app.command("gateway")
def bench_gateway(
    model: Model = DEFAULT_MODEL,
    streams: Annotated[int, typer.Option(min=1, max=4096)] = 32,
    tokens_per_s: Annotated[float, typer.Option(min=0.1, max=1000, help="Of each stream.")] = 50.0,
    seconds: Annotated[float, typer.Option(min=0.1, max=3600, help="Of one turn of one arm.")] = 10.0,
    rounds: Annotated[int, typer.Option(min=1, max=100)] = 3,
    as_json: AsJson = False,
) -> None:
    """CPU that the gateway's process spends on a token, beside FastAPI with pydantic and StreamingResponse."""
    from tailrace.cli.bench.gateway import GatewayBenchOptions, run_gateway

    options = GatewayBenchOptions(
        model=model, streams=streams, tokens_per_s=tokens_per_s, seconds=seconds, rounds=rounds
    )
    run_gateway(options, as_json=as_json)


@bench_app.command("idle")
def bench_idle(
    model: Model = DEFAULT_MODEL,
    transport: Transport = "auto",
    seconds: Annotated[float, typer.Option(min=1, max=3600)] = 20.0,
    as_json: AsJson = False,
) -> None:
    """CPU of one gateway, one prefill and one decode worker with nothing to do."""
    from tailrace.cli.bench.idle import IdleOptions, run_idle

    run_idle(_quiet({"model": model, "transport": transport}), IdleOptions(seconds=seconds), as_json=as_json)


@bench_app.command("reuse")
def bench_reuse(
    model: Model = DEFAULT_MODEL,
    transport: Transport = "auto",
    prefix_tokens: Annotated[int, typer.Option(min=64, max=100_000, help="Kept somewhere.")] = 1024,
    new_tokens: Annotated[int, typer.Option(min=1, max=100_000, help="After them.")] = 64,
    prefixes: Annotated[int, typer.Option(min=8, max=1000, help="That take turns.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Counted, of all prefixes.")] = 3,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Compute threads a worker.")] = 1,
    cpu_memory: Annotated[str, typer.Option(help="Of the store that keeps all in memory.")] = "1GiB",
    nvme_memory: Annotated[str, typer.Option(help="Of the store that keeps nearly all on disk.")] = "28MiB",
    disk_bytes: Annotated[str, typer.Option(help="Of the latter's file.")] = "2GiB",
    directory: Annotated[str, typer.Option(help="Where the file is made; default: that of temporary files.")] = "",
    as_json: AsJson = False,
) -> None:
    """TTFT of a prompt whose prefix is in the worker's memory, in a store's memory or on its disk, beside a new one."""
    from tailrace.cli.bench.reuse import ReuseOptions, run_reuse

    options = ReuseOptions(
        prefix_tokens=prefix_tokens,
        new_tokens=new_tokens,
        prefixes=prefixes,
        rounds=rounds,
        threads=threads,
        cpu_memory=cpu_memory,
        nvme_memory=nvme_memory,
        disk_bytes=disk_bytes,
        directory=directory,
    )
    run_reuse(_quiet({"model": model, "transport": transport}), options, as_json=as_json)


@bench_app.command("offers")
def bench_offers(
    model: Model = DEFAULT_MODEL,
    transport: Transport = "auto",
    role: Annotated[str, typer.Option(help="decode or prefill: whose speed counts.")] = "decode",
    requests: Annotated[int, typer.Option(min=1, max=100_000, help="Of a turn.")] = 32,
    concurrency: Annotated[int, typer.Option(min=1, max=4096, help="Requests that are open at once.")] = 8,
    input_tokens: Annotated[int, typer.Option("--input", min=1, max=100_000, help="Prompt tokens each.")] = 40,
    output_tokens: Annotated[int, typer.Option("--output", min=1, max=100_000, help="Of a decode worker's.")] = 96,
    blocks: Annotated[int, typer.Option(min=16, max=1 << 20, help="Of a worker's pool.")] = 200,
    store_memory: Annotated[str, typer.Option(help="Of the store.")] = "256MiB",
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Counted turns of each.")] = 6,
    as_json: AsJson = False,
) -> None:
    """What a worker loses to the offers that it makes to a store, beside the same worker without a store."""
    from tailrace.cli.bench.offers import OffersOptions, run_offers

    if role not in ("decode", "prefill"):
        raise ConfigError(f"role: decode or prefill, not {role!r}", param="role")
    options = OffersOptions(
        role=role,
        requests=requests,
        concurrency=concurrency,
        input=input_tokens,
        output=output_tokens,
        rounds=rounds,
        num_blocks=blocks,
        store_memory=store_memory,
    )
    run_offers(_quiet({"model": model, "transport": transport}), options, as_json=as_json)


@bench_app.command("router")
def bench_router(
    prefill: Annotated[int, typer.Option(min=1, max=1024, help="Prefill workers.")] = 64,
    decode: Annotated[int, typer.Option(min=1, max=1024, help="Decode workers.")] = 64,
    stores: Annotated[int, typer.Option(min=0, max=1024, help="That hold every prompt, half of it on disk.")] = 0,
    blocks: Annotated[int, typer.Option(min=1000, max=20_000_000, help="Of the index.")] = 1_000_000,
    decisions: Annotated[int, typer.Option(min=10, max=100_000, help="Counted, of each arm.")] = 600,
    mixed_links: Annotated[bool, typer.Option(help="Each pair of workers has a rate of its own.")] = False,
    as_json: AsJson = False,
) -> None:
    """Where a 12,000-token prompt goes: hashing, lookup, pricing and choosing, in one process."""
    from tailrace.cli.bench.router import RouterBenchOptions, run_router

    options = RouterBenchOptions(prefill, decode, stores, blocks, decisions, mixed_links)
    run_router(options, as_json=as_json)


@bench_app.command("index")
def bench_index(
    blocks: Annotated[
        list[int] | None, typer.Option(min=1000, max=20_000_000, help="Of one index; again for another. 1e6 and 1e7.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=1024, help="That hold them.")] = 64,
    lookups: Annotated[int, typer.Option(min=10, max=100_000, help="Of each length.")] = 2000,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Turns of events.")] = 5,
    batches: Annotated[int, typer.Option(min=1, max=100_000, help="Of 64 events, of one turn.")] = 2000,
    as_json: AsJson = False,
) -> None:
    """The gateway's prefix index: lookups, events and memory, beside one in plain Python up to 2e6 blocks."""
    from tailrace.cli.bench.index import IndexBenchOptions, run_index

    sizes = tuple(blocks) if blocks else IndexBenchOptions().blocks
    if len(sizes) > 4:
        raise ConfigError(f"blocks: at most 4 sizes at once, got {len(sizes)}", param="blocks")
    options = IndexBenchOptions(blocks=sizes, workers=workers, lookups=lookups, rounds=rounds, batches=batches)
    run_index(options, as_json=as_json)


@bench_app.command("simulator")
def bench_simulator(
    model: Model = DEFAULT_MODEL,
    dtype: Dtype = "auto",
    quantization: Quantization = "none",
    prefill: Annotated[
        int, typer.Option(min=1, max=64, help="Prefill workers, a thread each: no more than cores.")
    ] = 2,
    blocks: Annotated[int, typer.Option(min=8, max=1 << 20, help="Of 16 tokens, of each worker.")] = 1000,
    workload: Annotated[str, typer.Option(help="shared-prefix, chat, sharegpt; with commas between.")] = (
        "shared-prefix,chat"
    ),
    trace: Annotated[Path | None, typer.Option(help="Instead: requests in Mooncake's format, made shorter.")] = None,
    policy: Annotated[str, typer.Option(help="With commas between; each has a cluster.")] = "cost,round-robin",
    requests: Annotated[int, typer.Option(min=2, max=100_000, help="Of one run.")] = 60,
    output: Annotated[int, typer.Option(min=1, max=4096, help="Tokens of an answer, at most.")] = 32,
    load: Annotated[float, typer.Option(min=0.01, max=100, help="As in tailrace simulate.")] = 1.0,
    fetch: Annotated[bool, typer.Option("--fetch/--no-fetch", help="Of prefixes, in the simulation.")] = True,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Runs of each workload and policy.")] = 3,
    as_json: AsJson = False,
) -> None:
    """What the simulator predicts of a cluster on this machine, beside what it does."""
    from tailrace.cli.bench.simulator import SimulatorBenchOptions, run_simulator

    options = SimulatorBenchOptions(
        workloads=tuple(workload.split(",")),
        trace=trace,
        policies=tuple(policy.split(",")),
        num_requests=requests,
        output_tokens=output,
        load=load,
        fetch=fetch,
        seeds=seeds,
    )
    settings = {"model": model, "dtype": dtype, "quantization": quantization, "prefill": prefill, "num_blocks": blocks}
    run_simulator(_quiet({**settings, "threads": 1}), options, as_json=as_json)


@bench_app.command("redis")
def bench_redis(
    redis: Annotated[str, typer.Option(help="redis:// or rediss:// URL.")],
    hashes: Annotated[int, typer.Option(min=1, max=100_000, help="Blocks of the prompt.")] = 256,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Holders of each block.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, max=1_000_000, help="Counted turns of each arm.")] = 200,
    as_json: AsJson = False,
) -> None:
    """Looking a prompt up in Redis, beside redis-py's pipelined GETs of the same keys."""
    from tailrace.cli.bench.redis_lookup import RedisLookupOptions, run_redis
    from tailrace.index.redis_url import RedisUrl

    try:
        url = RedisUrl.parse(redis)
    except ValueError as error:
        raise ConfigError(f"redis: {error}", param="redis") from None
    run_redis(url, RedisLookupOptions(num_hashes=hashes, num_workers=workers, rounds=rounds), as_json=as_json)


def _quiet(settings: Settings) -> UpConfig:
    return UpConfig(**settings, port=0, log_level="warning")

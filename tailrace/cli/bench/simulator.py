"""`tailrace bench simulator`: what `tailrace simulate` predicts of a cluster on this machine, beside what it does.

The profile says what idle workers take. How much longer everything takes while client, gateway and all workers share
the machine is measured on a workload of its own, replayed before each one that is compared and after the last; nothing
is fitted to those. Then all of it is simulated, with the same policy, pools and arrivals.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from tailrace.checkpoint.model_config import load_model_config
from tailrace.cli.bench.load import Asker
from tailrace.cli.bench.measured_profile import ProfileMeter
from tailrace.cli.bench.replay import EXPLAIN, Figures, Served, TokenBlocks, compared, replay
from tailrace.cli.bench.report import header, print_footer, served
from tailrace.cli.bench.run import measure_and_show
from tailrace.cli.bench.simulated_replays import CALIBRATION, WARM_UP, Case, Replay, Simulated, simulate
from tailrace.cli.cluster import running_cluster
from tailrace.cli.console import ClusterConsole
from tailrace.cli.model import fetch_model
from tailrace.config import UpConfig
from tailrace.config_values import RoutingPolicy
from tailrace.errors import ConfigError
from tailrace.kv.hashing import HASH_BYTES
from tailrace.sim.generate import GENERATORS, generate
from tailrace.sim.workload import SimRequest, Workload, read_trace

SHRINK = 4
"""Generated prompts are this much shorter than what `tailrace simulate` makes for a GPU."""


@dataclass(frozen=True, slots=True)
class SimulatorBenchOptions:
    workloads: tuple[str, ...] = ("shared-prefix", "chat")
    """Of GENERATORS; not looked at where there is a trace."""
    trace: Path | None = None
    """In Mooncake's format. Its blocks become the workers', which makes its prompts as much shorter."""
    policies: tuple[str, ...] = ("cost", "round-robin")
    num_requests: int = 60
    output_tokens: int = 32
    """Of an answer, at most; 1: nothing is decoded."""
    load: float = 1.0
    """Prefill seconds of all prompts, uncached, over the workers' time."""
    fetch: bool = True
    """Whether simulated workers fetch prefixes, as real ones do."""
    seeds: int = 3
    """Workloads of each kind; of a trace, pieces one after the other."""

    def __post_init__(self) -> None:
        policies = get_args(RoutingPolicy)
        for name, values, known in (("workload", self.workloads, GENERATORS), ("policy", self.policies, policies)):
            if unknown := [value for value in values if value not in known]:
                raise ConfigError(f"{name}: must be one of {', '.join(known)}, got {unknown[0]!r}", param=name)


CALIBRATION_REQUESTS = 16
CALIBRATION_SEED = 1000
"""The first one's; far from those that are compared."""
WARM_UP_LENGTHS = (1024, 1024, 1024, 1024, 64, 64)
"""Tokens of the prompts that each cluster is asked before anything counts, one a second; they are simulated too."""


def cases(options: SimulatorBenchOptions, block_tokens: int) -> Iterator[Case]:
    """Raises ConfigError for a trace that is too short, WorkloadError for one that cannot be read."""
    if options.trace is None:
        for kind in options.workloads:
            for seed in range(options.seeds):
                whole = generate(kind, options.num_requests, block_tokens * SHRINK, seed)
                yield Case(kind, seed, _asked(whole.with_blocks_of(block_tokens), options.output_tokens))
        return
    whole = read_trace(options.trace)
    needed = options.num_requests * options.seeds
    if len(whole.requests) < needed:
        raise ConfigError(f"trace: has {len(whole.requests)} requests, {needed} are needed", param="trace")
    for seed in range(options.seeds):
        piece = whole.requests[seed * options.num_requests : (seed + 1) * options.num_requests]
        shorter = Workload(piece, whole.block_tokens).with_blocks_of(block_tokens)
        yield Case(options.trace.name, seed, _asked(shorter, options.output_tokens))


def _asked(workload: Workload, most_tokens: int) -> Workload:
    """With answers of `most_tokens` at most, of which no later prompt knows: the model writes others."""
    asked = [
        replace(request, num_output_tokens=max(1, min(most_tokens, request.num_output_tokens)), answer_hashes=())
        for request in workload.requests
    ]
    return Workload(asked, workload.block_tokens)


def calibration(number: int, options: SimulatorBenchOptions, block_tokens: int) -> Case:
    """Another one each time."""
    seed = CALIBRATION_SEED + number
    whole = generate("shared-prefix", CALIBRATION_REQUESTS, block_tokens * SHRINK, seed)
    return Case(CALIBRATION, seed, _asked(whole.with_blocks_of(block_tokens), options.output_tokens))


def _warm_up(block_tokens: int) -> Case:
    """Nothing in common with anything."""
    requests = [
        SimRequest(float(second), length, 1, _names(f"{second}", length // block_tokens))
        for second, length in enumerate(WARM_UP_LENGTHS)
    ]
    return Case(WARM_UP, 0, Workload(requests, block_tokens))


def _names(salt: str, count: int) -> tuple[bytes, ...]:
    return tuple(blake2b(f"{salt} {i}".encode(), digest_size=HASH_BYTES).digest() for i in range(count))


def run_simulator(config: UpConfig, options: SimulatorBenchOptions, *, as_json: bool) -> None:
    """Prints a table, or one JSON object on stdout. Raises ConfigError, ChildFailedError or UnavailableError."""
    model = fetch_model(config.model, config.revision, config.cache_dir)
    measure_and_show(_measure(config, options, model), _print, as_json=as_json)


async def _measure(config: UpConfig, options: SimulatorBenchOptions, model: Path) -> dict[str, Any]:
    head = header("simulator")
    about, name = load_model_config(model), config.model_names[0]
    todo = list(cases(options, config.block_size))
    listener = ClusterConsole(Console(stderr=True), quiet=True)
    replays: list[Replay] = []
    async with AsyncExitStack() as stack:

        async def started(policy: str) -> Asker:
            arm = config.model_copy(update={"port": 0, "routing_policy": policy})
            cluster = await stack.enter_async_context(running_cluster(arm, model, listener))
            return await stack.enter_async_context(Asker(cluster.api_url, headers=EXPLAIN))

        async def replayed(case: Case) -> None:
            for policy, asker in askers.items():
                blocks = TokenBlocks(case.workload, about.vocab_size, f"{case.name} {case.seed}")
                began_s = time.perf_counter()
                real = await replay(asker, name, case.workload, blocks)
                replays.append(Replay(case, policy, began_s, real))

        askers = {policy: await started(policy) for policy in options.policies}
        # A cluster of its own: a router that has just seen the meter's requests would still count them as load.
        meter = ProfileMeter(await started("round-robin"), name, config, about)
        await meter.warm_up()
        await replayed(_warm_up(config.block_size))
        await meter.take_round()
        await meter.take_round()
        profile = meter.result().profile
        for number, case in enumerate([*todo, None]):
            for each in (calibration(number, options, config.block_size), case):
                if each is not None:
                    workload = each.workload.at_load(options.load, config.prefill, profile)
                    await replayed(replace(each, workload=workload))
        await meter.take_round()
    measured = meter.result()
    runs = []
    for policy in options.policies:
        mine = [one for one in replays if one.policy == policy]
        said = simulate(mine, config, measured.profile, fetch=options.fetch)
        runs += [describe(each, config.prefill) for each in said if each.replay.is_compared]
    return {
        **head,
        "options": {**asdict(options), "trace": options.trace.name if options.trace else None},
        "served": served(config),
        "cluster": {"prefill": config.prefill, "decode": config.decode, "num_blocks": config.num_blocks},
        "profile": measured.report(),
        "runs": runs,
        "summary": summarize(runs),
    }


def describe(simulated: Simulated, num_workers: int) -> dict[str, Any]:
    one, pace = simulated.replay, simulated.pace
    was, said = Figures.of(one.served, num_workers), Figures.of(simulated.served, num_workers)
    return {
        "workload": one.case.name,
        "seed": one.case.seed,
        "policy": one.policy,
        "duration_s": round(one.case.workload.duration_s, 2),
        "oracle_hit_rate": round(one.case.workload.oracle_hit_rate(), 4),
        "real": _rounded(asdict(was)),
        "simulated": _rounded(asdict(said)),
        "error": _rounded(compared(was, said)),
        "pace": {"prefill": round(pace.prefill, 3), "decode": round(pace.decode, 3)},
        "same_worker": round(_agreement(one.served, simulated.served, num_workers), 4),
        "by_decode_workers": [sum(each.worker < 0 for each in served) for served in (one.served, simulated.served)],
    }


def _agreement(real: Sequence[Served], simulated: Sequence[Served], num_workers: int) -> float:
    """Share of requests that both gave to the same worker; which of them is called the first does not matter."""
    pairs = [(a.worker, b.worker) for a, b in zip(real, simulated, strict=True)]
    turns = (sum((a + turn) % num_workers == b for a, b in pairs if a >= 0) for turn in range(num_workers))
    return max(turns) / len(pairs)


def summarize(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the seeds of each workload and policy: means of both, and the errors' mean, least and greatest."""
    rows: list[dict[str, Any]] = []
    for workload, policy in dict.fromkeys((run["workload"], run["policy"]) for run in runs):
        mine = [run for run in runs if (run["workload"], run["policy"]) == (workload, policy)]
        row: dict[str, Any] = {"workload": workload, "policy": policy, "runs": len(mine)}
        for name in Figures.__slots__:
            errors = [run["error"][name] for run in mine]
            row[name] = {
                "real": round(statistics.mean(run["real"][name] for run in mine), 4),
                "simulated": round(statistics.mean(run["simulated"][name] for run in mine), 4),
                "error": [round(value, 4) for value in (statistics.mean(errors), min(errors), max(errors))],
            }
        rows.append(row)
    return rows


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) for name, value in values.items()}


def _print(result: dict[str, Any]) -> None:
    console = Console()
    for row in result["summary"]:
        table = Table("", "real", "simulated", "error (least to greatest)")
        table.title = f"{row['workload']}, {row['policy']}, {row['runs']} runs"
        for name in Figures.__slots__:
            mean, least, most = row[name]["error"]
            as_points = name.endswith("_rate")
            shape = "+.3f" if as_points else "+.1%"
            error = f"{mean:{shape}} ({least:{shape}} to {most:{shape}})"
            table.add_row(name, f"{row[name]['real']:.3f}", f"{row[name]['simulated']:.3f}", error)
        console.print(table)
    console.print(result["profile"], highlight=False)
    print_footer(console, result)

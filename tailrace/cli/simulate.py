"""`tailrace simulate`: a cluster under virtual time, as a table, a JSON object or a picture."""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tailrace.errors import ConfigError
from tailrace.policy.choosing import POLICIES
from tailrace.sim.generate import GENERATORS, generate
from tailrace.sim.profile import PROFILES, HardwareProfile
from tailrace.sim.result import SimResult, Slo
from tailrace.sim.simulator import SimOptions, Simulator
from tailrace.sim.workload import Workload, read_trace

MAX_BLOCKS = 20_000_000
"""Of all pools together; a simulated block takes this process some hundred bytes."""


@dataclass(frozen=True, slots=True)
class SimulateOptions:
    trace: Path | None
    workload: str
    """One of GENERATORS, where there is no trace."""
    num_requests: int
    """Of a generated workload; of a trace, all."""
    seed: int
    block_tokens: int
    load: float
    workers: int
    decode: int | None
    blocks_per_worker: int
    decode_blocks: int | None
    """None: as many as blocks_per_worker."""
    policy: str
    profile: str
    link_gbit_per_s: float | None
    """None: the profile's."""
    fetch: bool
    cpu_blocks: int | None
    """None: as many as the profile's host memory holds."""
    nvme_blocks: int | None
    stepwise: bool
    slo: Slo
    plot: Path | None


def run_simulate(options: SimulateOptions, *, as_json: bool) -> None:
    """Raises ConfigError for a setting, WorkloadError for a line of the trace."""
    for name, value, known in (("policy", options.policy, POLICIES), ("profile", options.profile, PROFILES)):
        if value not in known:
            raise ConfigError(f"{name}: must be one of {', '.join(known)}, got {value!r}", param=name)
    draw = _plotter(options.plot)
    profile = PROFILES[options.profile]
    if options.link_gbit_per_s is not None:
        profile = profile.with_link(options.link_gbit_per_s)
    workload = _workload(options).at_load(options.load, options.workers, profile)
    began = time.perf_counter()
    outcome = Simulator(workload, _sim_options(options, profile)).run()
    wall_s = time.perf_counter() - began
    result = SimResult.of(workload, outcome, options.slo)
    if draw is not None and options.plot is not None:
        draw(options.plot, workload, outcome, f"{options.policy}, {options.workers} workers, load {options.load:g}")
    report = {**_about(options), **asdict(result)}
    # Not in the result: that is the same each time.
    print(f"simulated in {wall_s:.1f} s", file=sys.stderr)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print_table(report)


def _workload(options: SimulateOptions) -> Workload:
    if options.trace is not None:
        return read_trace(options.trace, options.block_tokens)
    if options.workload not in GENERATORS:
        known = ", ".join(GENERATORS)
        raise ConfigError(f"workload: must be one of {known}, got {options.workload!r}", param="workload")
    return generate(options.workload, options.num_requests, options.block_tokens, options.seed)


def _sim_options(options: SimulateOptions, profile: HardwareProfile) -> SimOptions:
    per_decode = options.decode_blocks or options.blocks_per_worker
    if (total := options.workers * options.blocks_per_worker + (options.decode or 0) * per_decode) > MAX_BLOCKS:
        raise ConfigError(
            f"blocks_per_worker: all pools together are {total:,} blocks; at most {MAX_BLOCKS:,} can be simulated",
            param="blocks_per_worker",
        )
    block_bytes = options.block_tokens * profile.kv_bytes_per_token
    cpu, nvme = options.cpu_blocks, options.nvme_blocks
    return SimOptions(
        num_workers=options.workers,
        profile=profile,
        num_decode=options.decode,
        blocks_per_worker=options.blocks_per_worker,
        decode_blocks=options.decode_blocks,
        policy=options.policy,
        fetch=options.fetch,
        cpu_blocks=int(profile.host_memory_bytes // block_bytes) if cpu is None else cpu,
        nvme_blocks=int(profile.nvme_bytes // block_bytes) if nvme is None else nvme,
        stepwise_decode=options.stepwise,
    )


def _about(options: SimulateOptions) -> dict[str, Any]:
    """What was simulated; no path, so that a result says the same wherever the trace lies."""
    source = options.trace.name if options.trace is not None else options.workload
    return {
        "workload": source,
        "profile": options.profile,
        "policy": options.policy,
        "workers": options.workers,
        "decode": options.decode,
        "blocks_per_worker": options.blocks_per_worker,
        "decode_blocks": options.decode_blocks or options.blocks_per_worker if options.decode else None,
        "block_tokens": options.block_tokens,
        "load": options.load,
        "seed": options.seed,
        "fetch": options.fetch,
    }


def _plotter(path: Path | None) -> Any:
    """What draws; before anything is simulated, so that a missing package costs no wait. Raises ConfigError."""
    if path is None:
        return None
    if path.suffix != ".png" or not path.absolute().parent.is_dir():
        raise ConfigError(f"plot: must be a .png file in a directory that exists, got {path}", param="plot")
    try:
        from tailrace.sim.plot import draw
    except ImportError as error:
        raise ConfigError(f"plot: needs matplotlib: pip install 'tailrace[plot]' ({error})", param="plot") from None
    return draw


def _print_table(report: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None)
    for name, value in report.items():
        if isinstance(value, dict):
            value = "  ".join(f"{key} {share:.4f}" for key, share in value.items())
        table.add_row(
            name, f"{value:.4f}" if isinstance(value, float) else "unlimited" if value is None else str(value)
        )
    Console().print(table, highlight=False)

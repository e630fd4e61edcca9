"""The tables of docs/benchmarks/2026-11-21-routing.md: `python -m benchmarks.simulated_routing TRACE`, some minutes."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tailrace.sim.generate import GENERATORS, generate
from tailrace.sim.profile import PROFILES
from tailrace.sim.result import SimResult, Slo
from tailrace.sim.simulator import SimOptions, Simulator
from tailrace.sim.workload import Workload, read_trace

PROFILE = PROFILES["h100"]
POLICIES = ("cost", "round-robin", "least-loaded")


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    options: SimOptions
    load: float = 0.7


def rows(block_tokens: int) -> Iterator[Row]:
    store = {
        "cpu_blocks": int(PROFILE.host_memory_bytes // (block_tokens * PROFILE.kv_bytes_per_token)),
        "nvme_blocks": int(PROFILE.nvme_bytes // (block_tokens * PROFILE.kv_bytes_per_token)),
    }
    alone = SimOptions(8, PROFILE, fetch=False)
    fetching = SimOptions(8, PROFILE, **store)
    for policy in (*POLICIES, "prefix"):
        yield Row("8", replace(alone, policy=policy))
    for policy in POLICIES:
        yield Row("8", replace(alone, policy=policy), 1.1)
    for policy in POLICIES:
        yield Row("64", replace(alone, num_workers=64, policy=policy))
    yield Row("64", replace(alone, num_workers=64), 1.1)
    for workers in (8, 64):
        for load in (0.7, 1.1):
            yield Row(str(workers), replace(fetching, num_workers=workers), load)
    for load in (0.7, 1.1):
        yield Row("8, 8 decode", replace(fetching, num_decode=8), load)
        yield Row("8, free link", replace(fetching, profile=PROFILE.with_link(1e6)), load)
    for blocks in (5000, 2000):
        yield Row(f"8, {blocks:,} blocks", replace(alone, blocks_per_worker=blocks))
    yield Row("8, 2,000 blocks", replace(fetching, blocks_per_worker=2000))


def simulate(workload: Workload, options: SimOptions, load: float) -> SimResult:
    workload = workload.at_load(load, options.num_workers, options.profile)
    return SimResult.of(workload, Simulator(workload, options).run(), Slo())


def print_trace(trace: Workload) -> None:
    print("| workers | policy | load | fetch | hit rate | fetched | over oracle | imbalance | TTFT mean | p50 | p99 |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows(trace.block_tokens):
        found = simulate(trace, row.options, row.load)
        over = (found.hit_rate + found.fetch_rate) / found.oracle_hit_rate
        fetched = f"{found.fetch_rate:.3f}" if row.options.fetch else "-"
        cells = (
            row.name,
            row.options.policy,
            row.load,
            "yes" if row.options.fetch else "no",
            f"{found.hit_rate:.4f}",
            fetched,
            f"{over:.3f}",
            f"{found.imbalance:.3f}",
            f"{found.ttft_mean_s:,.3f}",
            f"{found.ttft_p50_s:,.3f}",
            f"{found.ttft_p99_s:,.2f}",
        )
        print("|", " | ".join(map(str, cells)), "|", flush=True)
    print(f"\noracle {found.oracle_hit_rate:.4f}, least mean TTFT {found.ttft_floor_mean_s:.4f} s\n")


def print_generated() -> None:
    print("| workload | oracle |", " | ".join(POLICIES), "|")
    print("|---|---|---|---|---|")
    for kind in GENERATORS:
        workload = generate(kind, 10_000, 512, 0)
        options = SimOptions(8, PROFILE, fetch=False, blocks_per_worker=2000)
        found = [simulate(workload, replace(options, policy=policy), 2.0) for policy in POLICIES]
        cells = (f"{r.hit_rate:.3f}, {r.imbalance:.2f}, {r.ttft_mean_s * 1e3:,.3g}" for r in found)
        print(f"| {kind} | {found[0].oracle_hit_rate:.3f} |", " | ".join(cells), "|", flush=True)


def print_answers() -> None:
    print("| chat, blocks of 16, load 0.02 | hit rate | fetched | of decode workers | oracle | TTFT mean, ms |")
    print("|---|---|---|---|---|---|")
    workload = generate("chat", 2000, 16, 0)
    options = SimOptions(8, PROFILE, num_decode=8, blocks_per_worker=20_000)
    for fetch in (False, True):
        found = simulate(workload, replace(options, fetch=fetch), 0.02)
        oracles = f"{found.oracle_hit_rate:.3f}, with answers {found.oracle_answers_hit_rate:.3f}"
        cells = (
            "fetching" if fetch else "not",
            f"{found.hit_rate:.3f}",
            f"{found.fetch_rate:.3f}",
            f"{found.tier_hits['decode']:.3f}",
            oracles,
            f"{found.ttft_mean_s * 1e3:.2f}",
        )
        print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    print_trace(read_trace(Path(sys.argv[1])))
    print_generated()
    print_answers()

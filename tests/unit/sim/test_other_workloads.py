"""What `cost` promises on whatever it is given: no other policy is much quicker, and hits and balance hold."""

from pathlib import Path

import pytest

from benchmarks.other_workloads import KINDS, lines, write
from tailrace.sim.profile import PROFILES
from tailrace.sim.result import SimResult, Slo
from tailrace.sim.simulator import SimOptions, Simulator
from tailrace.sim.workload import read_trace

OTHERS = ("prefix", "least-loaded", "round-robin")


def simulated(path: Path, policy: str) -> SimResult:
    profile = PROFILES["h100"]
    workload = read_trace(path).at_load(1.0, 8, profile)
    options = SimOptions(8, profile, policy=policy, fetch=False)
    return SimResult.of(workload, Simulator(workload, options).run(), Slo())


@pytest.mark.parametrize(("kind", "imbalance"), [("questions", 1.2), ("tiny", 1.4), ("retrieval", 1.2)])
def test_no_policy_is_quicker_than_cost_on_workloads_that_it_was_not_made_on(
    tmp_path: Path, kind: str, imbalance: float
) -> None:
    """Where queues counted cached tokens, and neutral rates were load, each was lost to another policy at some load.

    Tiny prompts are over within a second, most of which it takes until every worker has the system prompts.
    """
    path = tmp_path / "trace.jsonl"
    write(path, kind, 800, 0, 512)
    cost = simulated(path, "cost")
    assert cost.hit_rate >= 0.9 * cost.oracle_hit_rate
    assert cost.imbalance <= imbalance
    for policy in OTHERS:
        assert cost.ttft_mean_s <= 1.05 * simulated(path, policy).ttft_mean_s, policy


@pytest.mark.parametrize("kind", KINDS)
def test_workloads_depend_on_their_seed_alone_and_name_each_block_by_its_prefix(kind: str) -> None:
    made = lines(kind, 200, 3, 512)
    assert made == lines(kind, 200, 3, 512) != lines(kind, 200, 4, 512)
    assert [line.timestamp for line in made] == sorted(line.timestamp for line in made)
    parents: dict[int, int] = {}
    for line in made:
        assert len(line.hash_ids) == -(-line.input_length // 512)
        for parent, name in zip((-1, *line.hash_ids), line.hash_ids, strict=False):
            assert parents.setdefault(name, parent) == parent

import dataclasses
import math

import pytest

from tailrace.policy.choosing import POLICIES
from tailrace.sim.generate import generate
from tailrace.sim.profile import PROFILES
from tailrace.sim.result import SimResult, Slo
from tailrace.sim.simulator import Pace, SimOptions, Simulator
from tailrace.sim.workload import SimRequest, Workload, block_name

H100 = PROFILES["h100"]
BLOCK = 512


def make_request(arrival_s: float, *blocks: int, output: int = 1) -> SimRequest:
    return SimRequest(arrival_s, len(blocks) * BLOCK, output, tuple(map(block_name, blocks)))


def simulate(workload: Workload, **changes: object) -> SimResult:
    options = dataclasses.replace(SimOptions(num_workers=2, profile=H100, fetch=False), **changes)
    simulator = Simulator(workload, options)
    result = SimResult.of(workload, simulator.run(), Slo())
    for node in (*simulator._prefills.values(), *simulator._decodes.values()):
        node.pool.check_integrity()
        ledger = node.pool.ledger()
        assert ledger.free + ledger.cached == ledger.total, "nothing is held when all is over"
    assert all(simulator._router._reservations.num_held(name) == 0 for name in simulator._prefills)
    return result


def of(*requests: SimRequest) -> Workload:
    return Workload(requests, BLOCK)


def test_one_request_takes_its_prefill() -> None:
    result = simulate(of(make_request(0.0, 1, 2, 3)))
    assert result.ttft_mean_s == result.ttft_p99_s == pytest.approx(H100.prefill_s(0, 3 * BLOCK))
    assert (result.hit_rate, result.oracle_hit_rate, result.refused) == (0.0, 0.0, 0)
    assert result.imbalance == 2.0


def test_a_later_request_finds_what_the_first_one_left() -> None:
    result = simulate(of(make_request(0.0, 1, 2, 3), make_request(5.0, 1, 2, 4)))
    assert result.hit_rate == result.oracle_hit_rate == pytest.approx(2 / 6)
    second = H100.prefill_s(2 * BLOCK, 3 * BLOCK)
    assert result.ttft_mean_s == pytest.approx((H100.prefill_s(0, 3 * BLOCK) + second) / 2)


def test_the_last_block_of_a_whole_hit_is_computed_as_workers_do() -> None:
    result = simulate(of(make_request(0.0, 1, 2), make_request(5.0, 1, 2)), num_workers=1)
    assert result.hit_rate == 0.25
    both = H100.prefill_s(0, 2 * BLOCK) + H100.prefill_s(BLOCK, 2 * BLOCK)
    assert result.ttft_mean_s == pytest.approx(both / 2)


def test_a_small_pool_evicts() -> None:
    requests = of(make_request(0.0, 1, 2, 3), make_request(5.0, 4, 5, 6), make_request(9.0, 1, 2, 3))
    assert simulate(requests, num_workers=1, blocks_per_worker=6).hit_rate == pytest.approx(2 / 9)
    # The tail of the first goes first: room for one block more than the second leaves one of its three.
    assert simulate(requests, num_workers=1, blocks_per_worker=4).hit_rate == pytest.approx(1 / 9)


def test_a_prompt_that_no_pool_can_hold_is_refused() -> None:
    result = simulate(of(make_request(0.0, 1), make_request(1.0, 1, 2, 3, 4)), blocks_per_worker=3)
    assert (result.requests, result.refused) == (2, 1)


def test_what_another_worker_has_is_fetched_when_its_owner_is_busy() -> None:
    prefix = range(20)
    requests = of(
        make_request(0.0, *prefix),
        make_request(10.0, *prefix, *range(100, 300)),
        make_request(10.001, *prefix, 999),
    )
    alone = simulate(requests)
    fetched = simulate(requests, fetch=True)
    assert (alone.fetch_rate, alone.hit_rate) == (0.0, pytest.approx(20 / 261))
    assert fetched.fetch_rate == pytest.approx(20 / 261)
    assert fetched.tier_hits == {
        "own": pytest.approx(20 / 261),
        "worker": fetched.fetch_rate,
        "decode": 0.0,
        "cpu": 0.0,
        "nvme": 0.0,
    }
    assert fetched.ttft_mean_s < alone.ttft_mean_s


def test_a_router_that_was_just_started_does_not_trust_links_of_a_gpu() -> None:
    prefix = range(20)
    requests = of(
        make_request(0.0, *prefix),
        make_request(10.0, *prefix, *range(100, 300)),
        make_request(10.001, *prefix, 999),
    )
    assert simulate(requests, fetch=True, knows_rates=False).fetch_rate == 0.0
    assert simulate(requests, fetch=True).fetch_rate > 0.0


def test_a_machine_that_slows_down_takes_longer_from_then_on() -> None:
    requests = of(make_request(0.0, 1, 2, 3), make_request(5.0, 4, 5, 6))
    outcome = Simulator(requests, SimOptions(1, H100, fetch=False, paces=(Pace(0.0, 1.0), Pace(4.0, 1.5)))).run()
    before, after = (record.ttft_s for record in outcome.records)
    assert after == pytest.approx(1.5 * before)


def test_what_was_pulled_of_a_prompt_stays_with_the_decode_worker() -> None:
    steps = 2 * H100.chunk_tokens // BLOCK
    first, again = make_request(0.0, *range(steps)), make_request(5.0, *range(steps), 99)
    options = {"num_workers": 1, "num_decode": 1, "fetch": True, "blocks_per_worker": steps + 1}
    other = make_request(2.0, *range(100, 101 + steps))
    kept = simulate(of(first, other, again), **options, decode_blocks=4 * steps).tier_hits["decode"]
    assert kept * (3 * steps + 2) == pytest.approx(steps / 2), "all but the last step's: the answer was over by then"


def test_prompts_share_a_step_and_end_with_it() -> None:
    budget = H100.chunk_tokens // BLOCK
    one, two, three = (tuple(range(start, start + length)) for start, length in ((0, budget), (100, 3), (200, 1)))
    requests = of(*(make_request(0.0, *blocks) for blocks in (one, two, three)))
    outcome = Simulator(requests, SimOptions(num_workers=1, profile=H100, fetch=False)).run()
    first_s = H100.prefill_s(0, budget * BLOCK)
    second_s = first_s + H100.step_s([(0, 3 * BLOCK), (0, BLOCK)])
    assert [record.ttft_s for record in outcome.records] == pytest.approx([first_s, second_s, second_s])


def test_tiers_bring_back_what_a_pool_evicted() -> None:
    requests = of(*(make_request(i * 5.0, *range(100 * (i % 3), 100 * (i % 3) + 40)) for i in range(9)))
    few = {"num_workers": 1, "blocks_per_worker": 45, "fetch": True}
    assert simulate(requests, **few).fetch_rate == 0.0
    from_memory = simulate(requests, **few, cpu_blocks=200)
    assert from_memory.tier_hits["cpu"] == pytest.approx(6 / 9 * 39 / 40)
    from_disk = simulate(requests, **few, cpu_blocks=1, nvme_blocks=200)
    assert from_disk.tier_hits["nvme"] > 0.5
    assert from_disk.tier_hits["cpu"] == 0.0
    assert simulate(requests, **few).ttft_mean_s > from_disk.ttft_mean_s > from_memory.ttft_mean_s


def test_an_answer_is_fetched_from_the_worker_that_wrote_it() -> None:
    first = dataclasses.replace(
        make_request(0.0, 1, 2, output=2 * BLOCK + 1), answer_hashes=(block_name(3), block_name(4))
    )
    # Two blocks beyond: the decode worker may not compute them itself.
    second = make_request(60.0, 1, 2, 3, 4, 5, 6)
    workload = of(first, second)
    alone, fetched = (simulate(workload, num_workers=1, num_decode=1, fetch=fetch) for fetch in (False, True))
    total = 2 + 6
    assert (alone.hit_rate, alone.fetch_rate) == (pytest.approx(2 / total), 0.0)
    assert (fetched.hit_rate, fetched.tier_hits["decode"]) == (pytest.approx(2 / total), pytest.approx(2 / total))
    assert (fetched.oracle_hit_rate, fetched.oracle_answers_hit_rate) == pytest.approx((2 / total, 4 / total))
    assert alone.ttft_mean_s > fetched.ttft_mean_s >= fetched.ttft_floor_mean_s
    assert simulate(workload, num_workers=1, fetch=True).fetch_rate == 0.0, "unlimited decode workers keep nothing"


def test_a_decode_worker_keeps_no_more_than_it_has_room_for() -> None:
    turns = [
        dataclasses.replace(make_request(i * 60.0, 10 * i, output=BLOCK + 1), answer_hashes=(block_name(10 * i + 1),))
        for i in range(3)
    ]
    again = make_request(200.0, 0, 1, 7)
    results = [
        simulate(of(*turns, again), num_workers=1, num_decode=1, fetch=True, decode_blocks=decode_blocks)
        for decode_blocks in (20, 3)
    ]
    assert [result.tier_hits["decode"] > 0.0 for result in results] == [True, False]


@pytest.mark.parametrize("num_decode", [None, 2])
@pytest.mark.parametrize("fetch", [True, False])
def test_a_run_depends_on_its_inputs_alone(fetch: bool, num_decode: int | None) -> None:
    workload = generate("shared-prefix", 400, BLOCK, seed=5).at_load(0.9, 4, H100)
    first, second = (
        simulate(workload, num_workers=4, blocks_per_worker=300, fetch=fetch, num_decode=num_decode) for _ in range(2)
    )
    assert first == second
    assert first.hit_rate + first.fetch_rate <= first.oracle_answers_hit_rate + 1e-9
    assert first.ttft_mean_s >= first.ttft_floor_mean_s
    assert math.isfinite(first.goodput)


@pytest.mark.parametrize("fetch", [True, False])
def test_decode_by_formula_and_step_by_step_agree_in_a_whole_run(fetch: bool) -> None:
    # Slow enough that answers are written before the next turn.
    workload = generate("chat", 300, 64, seed=6).at_load(0.02, 2, H100)
    options = {"num_decode": 2, "blocks_per_worker": 2000, "decode_blocks": 700, "fetch": fetch}
    fast, slow = (simulate(workload, **options, stepwise_decode=stepwise) for stepwise in (False, True))
    assert (fast.tier_hits["decode"] > 0.05) == fetch
    for name, value in dataclasses.asdict(fast).items():
        assert value == pytest.approx(getattr(slow, name), rel=1e-6), name


@pytest.mark.parametrize("kind", ["chat", "shared-prefix"])
def test_cost_beats_the_other_policies_where_prefixes_are_shared(kind: str) -> None:
    workload = generate(kind, 1500, BLOCK, seed=7).at_load(1.5, 8, H100)
    results = {policy: simulate(workload, num_workers=8, policy=policy) for policy in POLICIES}
    cost = results["cost"]
    assert cost.hit_rate > 0.95 * cost.oracle_hit_rate
    assert cost.hit_rate > results["round-robin"].hit_rate + 0.02
    for other in ("round-robin", "least-loaded", "prefix"):
        assert cost.ttft_mean_s < results[other].ttft_mean_s, other
    assert cost.imbalance < 1.6


def test_goodput_counts_what_meets_every_objective() -> None:
    workload = of(*(make_request(i * 10.0, i, output=3) for i in range(4)))
    options = SimOptions(num_workers=1, profile=H100, fetch=False)
    outcome = Simulator(workload, options).run()
    everything, nothing = (
        SimResult.of(workload, outcome, slo).goodput for slo in (Slo(), Slo(ttft_s=10.0, tpot_s=1e-9))
    )
    assert everything == pytest.approx(4 / outcome.records[-1].finished_s)
    assert nothing == 0.0


def test_a_short_turn_is_computed_where_the_answer_was_written() -> None:
    first = dataclasses.replace(make_request(0.0, 1, 2, output=BLOCK + 1), answer_hashes=(block_name(3),))
    workload = of(first, make_request(60.0, 1, 2, 3, 4, output=2))
    simulator = Simulator(workload, SimOptions(1, H100, num_decode=1, fetch=False))
    before, after = simulator.run().records
    assert [(record.worker_id, record.is_local) for record in (before, after)] == [("p0", False), ("d0", True)]
    assert after.hit_tokens == 3 * BLOCK, "the answer too"
    assert after.ttft_s == after.prefill_s == pytest.approx(H100.step_s([(3 * BLOCK, 4 * BLOCK)]))
    step_s = H100.step_base_s + H100.step_per_token_s * 4 * BLOCK
    assert after.finished_s - after.first_token_s == pytest.approx(step_s)
    assert simulate(workload, num_workers=1, num_decode=1).imbalance == 1.0
    assert not any(record.is_local for record in Simulator(workload, SimOptions(1, H100)).run().records), "unlimited"


def test_what_a_decode_worker_computes_it_may_fetch_first() -> None:
    prefix = range(8)
    busy = [make_request(10.0 + 0.001 * i, *range(100 * i, 100 * i + 60)) for i in range(1, 4)]
    workload = of(make_request(0.0, *prefix), *busy, make_request(10.01, *prefix, 99, output=40))
    options = SimOptions(1, H100, num_decode=1, blocks_per_worker=1000)
    for stepwise in (False, True):
        last = Simulator(workload, dataclasses.replace(options, stepwise_decode=stepwise)).run().records[-1]
        # Half of it had been pulled before the first answer, of one token, was over.
        assert (last.is_local, last.fetched_tokens, last.hit_tokens) == (True, 4 * BLOCK, 4 * BLOCK)
        assert last.tier == "worker"


@pytest.mark.parametrize("fetch", [True, False])
def test_prompts_on_decode_workers_by_formula_and_step_by_step_agree(fetch: bool) -> None:
    workload = generate("chat", 300, 16, seed=6).at_load(0.3, 2, H100)
    options = SimOptions(2, H100, num_decode=2, blocks_per_worker=4000, fetch=fetch)
    fast, slow = (
        Simulator(workload, dataclasses.replace(options, stepwise_decode=stepwise)).run().records
        for stepwise in (False, True)
    )
    assert sum(record.is_local for record in fast) > 3
    for quick, exact in zip(fast, slow, strict=True):
        assert (quick.worker_id, quick.hit_tokens, quick.fetched_tokens) == (
            exact.worker_id,
            exact.hit_tokens,
            exact.fetched_tokens,
        )
        assert quick.finished_s == pytest.approx(exact.finished_s, rel=1e-9)


def test_workers_that_share_cores_slow_each_other_down() -> None:
    workload = of(make_request(0.0, 1, 2, 3, output=200), make_request(1.0, *range(10, 50)))
    own = Simulator(workload, SimOptions(1, H100, num_decode=1, fetch=False)).run().records
    shared = dataclasses.replace(H100, cores=1)
    both = Simulator(workload, SimOptions(1, shared, num_decode=1, fetch=False)).run().records
    assert both[0].ttft_s == pytest.approx(own[0].ttft_s), "alone"
    assert both[0].tpot_s > 1.2 * own[0].tpot_s
    assert 1.2 * own[1].ttft_s < both[1].ttft_s < 2.0 * own[1].ttft_s + 1e-9

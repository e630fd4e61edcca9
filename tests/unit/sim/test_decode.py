import math
from random import Random

import pytest

from tailrace.sim.decode import DecodeJob, DecodeNode
from tailrace.sim.prefill import PrefillJob
from tailrace.sim.profile import PROFILES
from tailrace.sim.workload import SimRequest, block_name

PROFILE = PROFILES["h100"]
BASE, PER_TOKEN = PROFILE.step_base_s, PROFILE.step_per_token_s


def finish_times(
    arrivals: list[tuple[float, DecodeJob]], *, stepwise: bool, num_blocks: int = 10**6, max_num_seqs: int = 8
) -> dict[int, float]:
    """Drives one node as the simulator does; when each job's last step ended."""
    node = DecodeNode("d0", num_blocks, max_num_seqs, PROFILE, stepwise=stepwise)
    times: dict[int, float] = {}
    waiting = sorted(arrivals, key=lambda arrival: arrival[0])
    now_s = 0.0
    while True:
        event_s = node.next_event_s(now_s)
        if waiting and (event_s is None or waiting[0][0] < event_s):
            now_s, job = waiting.pop(0)
            node.accept(job, now_s)
        elif event_s is not None:
            now_s = event_s
            for left in node.advance(now_s).left:
                times[left.number] = now_s
        else:
            return times


def test_one_sequence_takes_the_sum_of_its_steps() -> None:
    times = finish_times([(1.0, DecodeJob(0, 100, 3, 1))], stepwise=False)
    assert times == {0: pytest.approx(1.0 + 3 * BASE + PER_TOKEN * (100 + 101 + 102))}


def test_a_newcomer_joins_at_the_end_of_the_step_that_runs() -> None:
    first_step = BASE + PER_TOKEN * 1000
    jobs = [(0.0, DecodeJob(0, 1000, 2, 1)), (first_step / 2, DecodeJob(1, 50, 1, 1))]
    together = BASE + PER_TOKEN * (1001 + 50)
    times = finish_times(jobs, stepwise=False)
    assert times == {0: pytest.approx(first_step + together), 1: pytest.approx(first_step + together)}


def test_one_without_room_waits_until_another_leaves() -> None:
    jobs = [(0.0, DecodeJob(0, 100, 5, 6)), (0.0, DecodeJob(1, 100, 1, 5))]
    times = finish_times(jobs, stepwise=False, num_blocks=10)
    assert times[1] == pytest.approx(times[0] + BASE + PER_TOKEN * 100)


def test_others_find_a_prompt_from_its_first_step_on_and_its_answer_when_it_is_over() -> None:
    node = DecodeNode("d0", 10, 8, PROFILE, block_tokens=16)
    names = tuple(map(block_name, range(3)))
    node.accept(DecodeJob(0, 40, 10, 4, names), 0.0)
    assert not node.pool.find_prefix(names)
    node.advance(0.0)
    assert len(node.pool.find_prefix(names)) == 2, "full blocks of 40 tokens"
    node.advance(1.0)
    assert len(node.pool.find_prefix(names)) == 3


@pytest.mark.parametrize("seed", range(20))
def test_the_formula_and_step_by_step_agree(seed: int) -> None:
    random = Random(seed)
    now_s, jobs = 0.0, []
    for number in range(60):
        now_s += random.expovariate(1 / random.choice([0.001, 0.05, 0.5]))
        context, steps = random.randint(1, 100_000), random.randint(1, 300)
        jobs.append((now_s, DecodeJob(number, context, steps, random.randint(1, 30))))
    fast = finish_times(jobs, stepwise=False, num_blocks=60)
    slow = finish_times(jobs, stepwise=True, num_blocks=60)
    assert fast.keys() == slow.keys() == set(range(60))
    for number, when_s in slow.items():
        assert math.isclose(fast[number], when_s, rel_tol=1e-9), number


BLOCK = 16


def local_job(number: int, num_blocks: int, first: int = 0) -> PrefillJob:
    names = tuple(map(block_name, range(first, first + num_blocks)))
    return PrefillJob(number, SimRequest(0.0, num_blocks * BLOCK, 3, names), "d0")


def run_locals(
    node: DecodeNode, arrivals: list[tuple[float, DecodeJob, PrefillJob | None]]
) -> tuple[dict[int, float], dict[int, float]]:
    """When each prompt was computed, and when each job's last step ended."""
    computed: dict[int, float] = {}
    ended: dict[int, float] = {}
    now_s = 0.0
    waiting = list(arrivals)
    while True:
        event_s = node.next_event_s(now_s)
        if waiting and (event_s is None or waiting[0][0] < event_s):
            now_s, job, prompt = waiting.pop(0)
            if prompt is None:
                node.accept(job, now_s)
            else:
                node.accept_local(prompt, job, now_s)
        elif event_s is not None:
            now_s = event_s
            change = node.advance(now_s)
            computed |= {prompt.number: now_s for prompt in change.prefilled}
            ended |= {left.number: now_s for left in change.left}
        else:
            node.pool.check_integrity()
            ledger = node.pool.ledger()
            assert ledger.free + ledger.cached == ledger.total
            return computed, ended


@pytest.mark.parametrize("stepwise", [False, True])
def test_a_prompt_is_computed_beside_the_batch_and_holds_it_up(stepwise: bool) -> None:
    node = DecodeNode("d0", 1000, 8, PROFILE, block_tokens=BLOCK, stepwise=stepwise)
    prompt = local_job(1, 200)
    first_s = BASE + PER_TOKEN * 1000
    arrivals = [
        (0.0, DecodeJob(0, 1000, 50, 80), None),
        (first_s / 2, DecodeJob(1, 3200, 2, 201, prompt.request.hashes), prompt),
    ]
    computed, ended = run_locals(node, arrivals)
    most = PROFILE.chunk_tokens - 1
    assert most < 3200 < 2 * most, "a row takes a token of the step's budget"
    chunks_s = [max(PROFILE.step_s([chunk]), BASE) for chunk in ((0, most), (most, 3200))]
    at_s = first_s + sum(chunks_s) + PER_TOKEN * (1001 + 1002)
    assert computed == {1: pytest.approx(at_s)}
    then_s = 2 * BASE + PER_TOKEN * (1003 + 3200 + 1004 + 3201)
    assert ended[1] == pytest.approx(at_s + then_s)
    assert node.pool.find_prefix(prompt.request.hashes[:5]), "what it has computed stays cached"
    assert prompt.started_s == pytest.approx(first_s)


@pytest.mark.parametrize("stepwise", [False, True])
def test_a_prompt_finds_what_the_worker_has(stepwise: bool) -> None:
    node = DecodeNode("d0", 1000, 8, PROFILE, block_tokens=BLOCK, stepwise=stepwise)
    first, second = local_job(1, 4), local_job(2, 6)
    arrivals = [(float(job.number), DecodeJob(job.number, 96, 0, 7), job) for job in (first, second)]
    computed, ended = run_locals(node, arrivals)
    assert (first.hit_tokens, second.hit_tokens) == (0, 4 * BLOCK)
    assert computed == ended == {1: 1.0 + PROFILE.step_s([(0, 64)]), 2: 2.0 + PROFILE.step_s([(64, 96)])}


def test_who_is_woken_while_it_computes_its_last_prompt_has_nothing_to_do_then() -> None:
    node = DecodeNode("d0", 100, 8, PROFILE, block_tokens=BLOCK)
    node.accept_local(local_job(1, 4), DecodeJob(1, 64, 0, 4), 0.0)
    node.advance(0.0)
    node.wake()
    end_s = node.next_event_s(0.0)
    assert end_s == pytest.approx(PROFILE.step_s([(0, 64)]))
    assert len(node.advance(end_s).left) == 1
    assert node.next_event_s(end_s) is None


@pytest.mark.parametrize("seed", range(8))
def test_with_prompts_the_formula_and_step_by_step_agree_and_everybody_ends(seed: int) -> None:
    random = Random(seed)
    now_s, arrivals = 0.0, []
    for number in range(40):
        now_s += random.expovariate(1 / random.choice([0.001, 0.05, 0.5]))
        tokens, steps = random.randint(1, 20) * BLOCK, random.randint(0, 60)
        num_blocks = -(-(tokens + steps) // BLOCK)
        prompt = local_job(number, tokens // BLOCK, 100 * random.randint(0, 3)) if random.random() < 0.5 else None
        arrivals.append((now_s, DecodeJob(number, tokens, steps or 1, num_blocks), prompt))

    def run(*, stepwise: bool) -> tuple[dict[int, float], dict[int, float]]:
        # So few blocks that prompts wait for room, and so few slots that they wait for these.
        node = DecodeNode("d0", 30, 3, PROFILE, block_tokens=BLOCK, stepwise=stepwise)
        fresh = [
            (at_s, job, prompt and PrefillJob(prompt.number, prompt.request, "d0")) for at_s, job, prompt in arrivals
        ]
        return run_locals(node, fresh)

    fast, slow = run(stepwise=False), run(stepwise=True)
    assert len(fast[1]) == 40
    assert fast[0].keys() == slow[0].keys() == {job.number for _, job, prompt in arrivals if prompt}
    for quick, exact in zip(fast, slow, strict=True):
        assert all(math.isclose(quick[number], exact[number], rel_tol=1e-9) for number in exact)


def test_whoever_shares_a_core_takes_longer_from_then_on() -> None:
    node = DecodeNode("d0", 10, 8, PROFILE)
    node.accept(DecodeJob(0, 0, 10, 1), 0.0)
    node.advance(0.0)
    half_s = 5 * BASE + PER_TOKEN * (0 + 1 + 2 + 3 + 4)
    node.slow_down(2.0, half_s)
    end_s = node.next_event_s(half_s)
    assert end_s == pytest.approx(half_s + 2 * (5 * BASE + PER_TOKEN * (5 + 6 + 7 + 8 + 9)))

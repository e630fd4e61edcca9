import math
from random import Random

import pytest

from tailrace.sim.decode import DecodeJob, DecodeNode
from tailrace.sim.profile import PROFILES

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

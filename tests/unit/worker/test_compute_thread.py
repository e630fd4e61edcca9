import threading

import pytest

from tailrace.plan import StepOutput, StepPlan
from tailrace.worker.compute_thread import ComputeThread


class SlowRunner:
    """Waits in each step until it is let go."""

    def __init__(self) -> None:
        self.began: list[StepPlan] = []
        self.threads: set[int] = set()
        self.go = threading.Semaphore(0)
        self.failure: Exception | None = None

    def run(self, plan: StepPlan) -> StepOutput:
        self.began.append(plan)
        self.threads.add(threading.get_ident())
        assert self.go.acquire(timeout=5)
        if self.failure is not None:
            raise self.failure
        return StepOutput(tokens=[len(self.began)])


def test_steps_are_launched_without_waiting_and_computed_in_order_in_one_thread() -> None:
    runner = SlowRunner()
    compute = ComputeThread(runner)
    plans = [StepPlan(decode=[slot]) for slot in range(3)]
    steps = [compute.launch(plan) for plan in plans]
    runner.go.release(3)
    assert [step.wait().tokens for step in steps] == [[1], [2], [3]]
    assert runner.began == plans
    assert len(runner.threads) == 1
    assert runner.threads != {threading.get_ident()}
    compute.close()


def test_what_goes_wrong_is_raised_where_it_is_waited_for() -> None:
    runner = SlowRunner()
    runner.failure = ValueError("no such slot")
    compute = ComputeThread(runner)
    step = compute.launch(StepPlan(decode=[0]))
    runner.go.release()
    with pytest.raises(ValueError, match="no such slot"):
        step.wait()
    compute.close()


def test_closing_waits_for_what_was_launched() -> None:
    runner = SlowRunner()
    compute = ComputeThread(runner)
    compute.close()
    compute.launch(StepPlan(decode=[0]))
    runner.go.release()
    compute.close()
    assert len(runner.began) == 1

"""What a worker needs of an engine."""

from typing import Protocol

from tailrace.plan import StepOutput, StepPlan


class Runner(Protocol):
    def run(self, plan: StepPlan) -> StepOutput:
        """Apply the plan and compute it, in the calling thread."""
        ...

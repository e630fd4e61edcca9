"""What a worker needs of an engine."""

from dataclasses import dataclass
from typing import Protocol

from tailrace.plan import StepOutput, StepPlan


class PendingStep(Protocol):
    """A step that computes, or has done so."""

    def wait(self) -> StepOutput:
        """Blocks until the step is over: everything that it writes is written. Raises what went wrong in it."""
        ...


class Runner(Protocol):
    def launch(self, plan: StepPlan) -> PendingStep:
        """Apply the plan and compute it, at once or behind the steps launched before. The plan may not change."""
        ...


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    plan: StepPlan
    pending: PendingStep

"""Steps computed in a thread of their own, so that the engine's thread is free meanwhile.

For runners that compute in the calling thread. It gains only where a core is left for it.
"""

import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from tailrace.plan import StepOutput, StepPlan


class BlockingRunner(Protocol):
    def run(self, plan: StepPlan) -> StepOutput: ...


@dataclass(frozen=True, slots=True)
class FutureStep:
    output: "Future[StepOutput]"

    def wait(self) -> StepOutput:
        return self.output.result()


class ComputeThread:
    """Runs plans one after another. Its thread starts with the first one, and is the only one that calls `runner`."""

    def __init__(self, runner: BlockingRunner) -> None:
        self._runner = runner
        # Never longer than the steps that a scheduler plans ahead.
        self._plans: queue.SimpleQueue[tuple[StepPlan, Future[StepOutput]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)

    def launch(self, plan: StepPlan) -> FutureStep:
        if self._thread.ident is None:
            self._thread.start()
        output: Future[StepOutput] = Future()
        self._plans.put((plan, output))
        return FutureStep(output)

    def close(self) -> None:
        """Waits for what was launched. Idempotent."""
        if self._thread.ident is not None:
            self._plans.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (job := self._plans.get()) is not None:
            plan, output = job
            try:
                output.set_result(self._runner.run(plan))
            except BaseException as error:
                output.set_exception(error)

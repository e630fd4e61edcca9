"""Finding workers that say nothing, and those that answer but do not work."""

import asyncio
import time
from collections.abc import Callable

from tailrace.errors import WorkerLostError
from tailrace.messages import Load

HUNG_S = 60.0
"""A worker with work to do whose step counter stands still for this long is hung, however lively its answers are."""
NUDGE_S = 30.0
"""After so long it is asked for its ledger: an engine that only waits for others makes a step to answer."""


class Silence:
    """Calls once when nothing was heard for so long. Costs a timer a silence, not one for each thing heard."""

    def __init__(self, longest_s: float, on_over: Callable[[], None]) -> None:
        self.is_over = False
        self._longest_s = longest_s
        self._on_over = on_over
        self._loop = asyncio.get_running_loop()
        self._heard_at = self._loop.time()
        self._timer = self._loop.call_later(longest_s, self._check)

    def heard(self) -> None:
        self._heard_at = self._loop.time()

    def stop(self) -> None:
        self._timer.cancel()

    def _check(self) -> None:
        ends_at = self._heard_at + self._longest_s
        if ends_at > self._loop.time():
            self._timer = self._loop.call_at(ends_at, self._check)
        else:
            self.is_over = True
            self._on_over()


class WorkWatch:
    """Finds the worker that answers but does not work."""

    def __init__(self) -> None:
        self._step = -1
        self._moved_at = time.monotonic()
        self._has_nudged = False

    def needs_nudge(self, step: int, load: Load, worker_id: str) -> bool:
        """True once, when the step counter has stood still for long with work to do.

        Raises WorkerLostError when not even that has moved it.
        """
        now = time.monotonic()
        if step != self._step or not (load.num_running or load.num_waiting):
            self._step, self._moved_at, self._has_nudged = step, now, False
        stood_s = now - self._moved_at
        if stood_s > HUNG_S:
            raise WorkerLostError(f"{worker_id} hangs: no step in {HUNG_S:g} s with work to do")
        if stood_s <= NUDGE_S or self._has_nudged:
            return False
        self._has_nudged = True
        return True

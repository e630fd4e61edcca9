"""The engine's thread. Everything that owns blocks lives on it; the event loop talks to it through two queues.

Commands are applied between steps, so no command ever meets a half-booked step. With nothing to compute the thread
sleeps on its inbox: an idle worker uses no CPU.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar

from tailrace.worker.report import StepReport
from tailrace.worker.runner import LaunchedStep

log = logging.getLogger(__name__)
T = TypeVar("T")
Command = Callable[[], None]


class SteppingWorker(Protocol):
    def launch(self) -> LaunchedStep | None:
        """Schedules a step and starts it. With `overlap` once more before `finish`. None: nothing to do now."""
        ...

    def finish(self, step: LaunchedStep | None) -> StepReport:
        """Waits for the step and books it; also what commands left to say. `computed` is False when nothing ran."""
        ...


class EngineThread:
    """`deliver` is called on the event loop, once a step, in order; `died` once, when a step raised.

    `overlap`: a step is scheduled and launched while the one before it still computes. Commands then take effect a step
    later, and gain what scheduling, booking and starting a step take.
    `chore`: some milliseconds of work for when there is nothing to compute; False: there is no more.
    """

    def __init__(
        self,
        worker: SteppingWorker,
        *,
        deliver: Callable[[StepReport], None],
        died: Callable[[BaseException], None],
        overlap: bool = False,
        chore: Callable[[], bool] = lambda: False,
    ) -> None:
        self._worker = worker
        self._deliver = deliver
        self._died = died
        self._chore = chore
        self._step = self._overlapped_step if overlap else self._plain_step
        self._ahead: LaunchedStep | None = None
        """Launched, and not finished before the next turn."""
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.num_steps = 0
        """Steps begun. Frozen while there is work to do: the engine hangs."""

    def start(self) -> None:
        self._thread.start()

    async def stop(self) -> None:
        """Lets what was launched end. Idempotent."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join, 10.0)

    def post(self, function: Callable[..., object], *args: object) -> None:
        """Run on the engine's thread before the next step."""
        self._inbox.put(partial(_apply, function, *args))

    async def call(self, function: Callable[..., T], *args: object) -> T:
        """As `post`, and give back what it returns or raises."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._inbox.put(partial(self._answer, future, function, *args))
        return await future

    def _answer(self, future: "asyncio.Future[T]", function: Callable[..., T], *args: object) -> None:
        try:
            result = function(*args)
        except Exception as error:
            self._loop.call_soon_threadsafe(_fail, future, error)
        else:
            self._loop.call_soon_threadsafe(_resolve, future, result)

    def _run(self) -> None:
        try:
            computed = True
            while self._apply_commands(wait=not computed):
                computed = self._turn()
            if self._ahead is not None:
                self._tell(self._deliver, self._worker.finish(self._ahead))
        except BaseException as error:
            log.critical("the engine failed; this worker must be restarted", exc_info=True)
            self._tell(self._died, error)

    def _turn(self) -> bool:
        """False: there is nothing to compute."""
        self.num_steps += 1
        report = self._step()
        self._tell(self._deliver, report)
        return report.computed or self._ahead is not None

    def _plain_step(self) -> StepReport:
        step = self._worker.launch()
        return self._worker.finish(step)

    def _overlapped_step(self) -> StepReport:
        step = self._ahead or self._worker.launch()
        self._ahead = self._worker.launch() if step is not None else None
        return self._worker.finish(step)

    def _apply_commands(self, *, wait: bool) -> bool:
        """All that lie in the inbox; waits for the first one when asked to. False: stop."""
        while wait and self._inbox.empty() and self._chore():
            pass
        try:
            command = self._inbox.get(block=wait)
            while command is not None:
                command()
                command = self._inbox.get(block=False)
        except queue.Empty:
            return True
        return False

    def _tell(self, function: Callable[..., object], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            log.debug("the event loop is closed; nobody listens")


def _apply(function: Callable[..., object], *args: object) -> None:
    function(*args)


def _resolve(future: "asyncio.Future[T]", result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: "asyncio.Future[T]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tailrace.plan import StepOutput, StepPlan
from tailrace.worker.engine_thread import EngineThread
from tailrace.worker.report import StepReport
from tailrace.worker.runner import LaunchedStep
from tests.helpers.waiting import until


class CountingWorker:
    """Computes for as many steps as it has work."""

    def __init__(self) -> None:
        self.work = 0
        self.in_step = False
        self.steps: list[int] = []
        self.failure: BaseException | None = None
        self.gate = threading.Event()
        self.gate.set()

    def launch(self) -> None:
        self.in_step = True

    def finish(self, step: None) -> StepReport:
        self.gate.wait(5)
        if self.failure is not None:
            raise self.failure
        computed = self.work > 0
        self.work -= computed
        self.steps.append(self.work)
        self.in_step = False
        return StepReport(computed=computed)

    def add(self, work: int) -> None:
        assert not self.in_step, "a command met a half-done step"
        self.work += work


class Listener:
    def __init__(self) -> None:
        self.reports: list[StepReport] = []
        self.deaths: list[BaseException] = []
        self.died = asyncio.Event()

    def died_of(self, error: BaseException) -> None:
        self.deaths.append(error)
        self.died.set()


@asynccontextmanager
async def running(worker: CountingWorker, listener: Listener) -> AsyncIterator[EngineThread]:
    engine = EngineThread(worker, deliver=listener.reports.append, died=listener.died_of)
    engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def test_it_steps_while_there_is_work_and_reports_each_step_in_order() -> None:
    worker, listener = CountingWorker(), Listener()
    async with running(worker, listener) as engine:
        engine.post(worker.add, 3)
        await until(lambda: len(worker.steps) >= 4 and worker.work == 0 and len(listener.reports) == len(worker.steps))
    assert [report.computed for report in listener.reports].count(True) == 3
    assert not listener.reports[-1].computed
    assert engine.num_steps == len(worker.steps)


async def test_an_idle_thread_blocks() -> None:
    worker, listener = CountingWorker(), Listener()
    async with running(worker, listener) as engine:
        await until(lambda: listener.reports)
        steps, spans = engine.num_steps, []
        for _ in range(3):  # what else this process does may spoil one
            cpu = time.process_time()
            await asyncio.sleep(0.1)
            spans.append(time.process_time() - cpu)
        assert engine.num_steps == steps
        assert min(spans) < 0.02


async def test_commands_wait_for_the_end_of_a_step_and_come_before_the_next() -> None:
    worker, listener = CountingWorker(), Listener()
    async with running(worker, listener) as engine:
        await until(lambda: listener.reports)
        worker.gate.clear()
        engine.post(worker.add, 1)
        await until(lambda: worker.in_step)
        for _ in range(3):
            engine.post(worker.add, 1)
        answer = asyncio.create_task(engine.call(lambda: worker.work))
        await asyncio.sleep(0.02)
        assert not answer.done()
        worker.gate.set()
        assert await answer == 3


async def test_a_call_gives_back_results_and_errors_and_the_thread_lives_on() -> None:
    worker, listener = CountingWorker(), Listener()
    async with running(worker, listener) as engine:
        assert await engine.call(max, 3, 5) == 5
        with pytest.raises(ValueError, match="invalid literal"):
            await engine.call(int, "x")
        assert await engine.call(threading.current_thread) is engine._thread
    assert not listener.deaths


async def test_a_call_whose_caller_is_gone_is_done_all_the_same() -> None:
    worker, listener = CountingWorker(), Listener()
    async with running(worker, listener) as engine:
        task = asyncio.create_task(engine.call(worker.add, 2))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: len(worker.steps) >= 3)
    assert not listener.deaths


@pytest.mark.parametrize("where", ["step", "command"])
async def test_a_failure_is_told_once_and_ends_the_thread(where: str) -> None:
    worker, listener = CountingWorker(), Listener()
    async with running(worker, listener) as engine:
        await until(lambda: listener.reports)
        if where == "step":
            worker.failure = RuntimeError("broken")
            engine.post(worker.add, 1)
        else:
            engine.post(int, "x")
        async with asyncio.timeout(3):
            await listener.died.wait()
        await until(lambda: not engine._thread.is_alive())
    assert len(listener.deaths) == 1


async def test_stop_lets_the_running_step_end_and_may_be_repeated() -> None:
    worker, listener = CountingWorker(), Listener()
    async with running(worker, listener) as engine:
        await until(lambda: listener.reports)
        worker.gate.clear()
        engine.post(worker.add, 1)
        await until(lambda: worker.in_step)
        stopping = asyncio.create_task(engine.stop())
        await asyncio.sleep(0.02)
        assert not stopping.done()
        worker.gate.set()
        await stopping
        assert not engine._thread.is_alive()
        await engine.stop()
    await until(lambda: any(report.computed for report in listener.reports))


class PipelinedWorker:
    """Notes the order of what it is asked for; each step is of one number."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.log: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def launch(self) -> LaunchedStep | None:
        if not self.count:
            return None
        self.count -= 1
        self.log.append(f"launch {self.count}")
        return LaunchedStep(StepPlan(decode=[self.count]), StepOutput())

    def finish(self, step: LaunchedStep | None) -> StepReport:
        self.gate.wait(5)
        if step is not None:
            self.log.append(f"finish {step.plan.decode[0]}")
        return StepReport(computed=step is not None)


@asynccontextmanager
async def pipelined(
    worker: PipelinedWorker, listener: Listener, *, overlap: bool = True
) -> AsyncIterator[EngineThread]:
    engine = EngineThread(worker, deliver=listener.reports.append, died=listener.died_of, overlap=overlap)
    engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def test_overlapped_a_step_is_launched_before_the_one_before_it_is_finished() -> None:
    worker, listener = PipelinedWorker(3), Listener()
    async with pipelined(worker, listener) as engine:
        await until(lambda: listener.reports and not listener.reports[-1].computed)
        assert engine.num_steps == 4, "a turn a step, and one that found nothing"
    assert worker.log == ["launch 2", "launch 1", "finish 2", "launch 0", "finish 1", "finish 0"]


async def test_plain_a_step_is_finished_before_the_next_is_launched() -> None:
    worker, listener = PipelinedWorker(2), Listener()
    async with pipelined(worker, listener, overlap=False):
        await until(lambda: listener.reports and not listener.reports[-1].computed)
    assert worker.log == ["launch 1", "finish 1", "launch 0", "finish 0"]


async def test_a_step_that_hangs_freezes_the_counter_of_the_overlapped_loop() -> None:
    worker, listener = PipelinedWorker(5), Listener()
    worker.gate.clear()
    async with pipelined(worker, listener) as engine:
        await until(lambda: len(worker.log) == 2)
        await asyncio.sleep(0.02)
        assert (engine.num_steps, listener.reports) == (1, [])
        worker.gate.set()


async def test_stopping_ends_the_step_that_was_launched_ahead() -> None:
    worker, listener = PipelinedWorker(1000), Listener()
    worker.gate.clear()
    async with pipelined(worker, listener) as engine:
        await until(lambda: len(worker.log) == 2)
        stopping = asyncio.create_task(engine.stop())
        await asyncio.sleep(0.02)
        worker.gate.set()
        await stopping
        assert worker.log == ["launch 999", "launch 998", "finish 999", "finish 998"]
    await until(lambda: len(listener.reports) == 2)


class Chores:
    """Pieces of work; notes what the worker had to do meanwhile."""

    def __init__(self, worker: CountingWorker, count: int) -> None:
        self.worker = worker
        self.left = count
        self.work_meanwhile: list[int] = []
        self.gate = threading.Semaphore(0)

    def __call__(self) -> bool:
        if not self.left:
            return False
        self.work_meanwhile.append(self.worker.work)
        assert self.gate.acquire(timeout=5)
        self.left -= 1
        return self.left > 0


async def test_chores_are_for_when_nothing_is_to_compute_and_commands_come_between_them() -> None:
    worker, listener = CountingWorker(), Listener()
    chores = Chores(worker, 4)
    engine = EngineThread(worker, deliver=listener.reports.append, died=listener.died_of, chore=chores)
    engine.start()
    await until(lambda: len(chores.work_meanwhile) == 1)
    engine.post(worker.add, 3)
    chores.gate.release()
    await until(lambda: [report.computed for report in listener.reports].count(True) == 3)
    assert chores.left == 3
    for _ in range(3):
        chores.gate.release()
    await until(lambda: not chores.left)
    assert chores.work_meanwhile == [0, 0, 0, 0]
    assert await engine.call(lambda: "lives") == "lives"
    await engine.stop()
    assert not listener.deaths

"""Child processes that are started together, watched, started again when they die, and always ended together."""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, TypeVar

from tailrace.errors import TailraceError

T = TypeVar("T")

STOP_S = 10.0
"""Between SIGTERM and SIGKILL."""
LAST_LINES = 20
CONFIG_EXIT_CODE = 2
"""A child that ends with it will do so again: it was told something impossible."""
_PR_SET_PDEATHSIG = 1
_MAX_LINE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """One process to keep. The environment holds secrets, so it is no part of the repr."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    cores: tuple[int, ...] = ()
    """Cores that it may use; empty: all."""
    stops_first: bool = False
    """It is asked to end, and has ended, before the others are asked."""


@dataclass(frozen=True, slots=True)
class Death:
    """How a child ended that nobody had asked to."""

    name: str
    returncode: int
    lived_s: float
    last_lines: tuple[str, ...]

    @property
    def cause(self) -> str:
        if self.returncode >= 0:
            return f"exit code {self.returncode}"
        return f"signal {signal.Signals(-self.returncode).name}"

    def __str__(self) -> str:
        said = "".join(f"\n  {line}" for line in self.last_lines)
        return f"{self.name} died ({self.cause}) after {self.lived_s:.1f} s" + (
            f"; its last lines:{said}" if said else ""
        )


class ChildFailedError(TailraceError):
    """The children cannot do their work: one keeps dying at its start, or all are dead."""


class Listener(Protocol):
    """Told what the children say and what becomes of them."""

    def line(self, name: str, text: str) -> None: ...

    def died(self, death: Death, pause_s: float | None) -> None:
        """`pause_s` until it is started again; None: it is not."""


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When a dead child is started again. Pauses double until it has lived for `steady_s`."""

    enabled: bool = True
    first_pause_s: float = 0.5
    longest_pause_s: float = 30.0
    steady_s: float = 60.0
    start_attempts: int = 2
    """Deaths of one child before the cluster was ever ready, after which it is given up."""

    def pause_s(self, num_deaths: int) -> float:
        return min(self.longest_pause_s, self.first_pause_s * 2.0 ** min(num_deaths - 1, 32))

    def gives_up_start(self, death: Death, num_deaths: int) -> bool:
        return not self.enabled or death.returncode == CONFIG_EXIT_CODE or num_deaths >= self.start_attempts


class Child:
    """A running process and the last lines that it said. It leads a session of its own, so Ctrl-C does not reach it."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, say: Callable[[str, str], None]) -> None:
        self.name = name
        self._process = process
        self._say = say
        self._started_at = time.monotonic()
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, spec: ChildSpec, say: Callable[[str, str], None]) -> Self:
        process = await asyncio.create_subprocess_exec(
            *spec.command,
            env=dict(spec.environment),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_before_exec(spec.cores),
        )
        return cls(spec.name, process, say)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> Death:
        """Returns when the process has ended and what it said has been read."""
        returncode = await self._process.wait()
        # Somebody whom it started may hold the other end of the pipe open for ever.
        await asyncio.wait([self._reading], timeout=1.0)
        self._reading.cancel()
        return Death(self.name, returncode, time.monotonic() - self._started_at, tuple(self._last))

    def send(self, number: signal.Signals) -> None:
        """To the process and all that it started. Idempotent."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    async def _read(self) -> None:
        if self._process.stdout is not None:
            async for line in _lines(self._process.stdout):
                self._last.append(line)
                self._say(self.name, line)


class Supervisor:
    """Keeps children alive between `async with` and its end. Use it from the main thread: where that dies, they do."""

    def __init__(self, specs: Sequence[ChildSpec], listener: Listener, policy: RestartPolicy | None = None) -> None:
        self._specs = tuple(specs)
        self._listener = listener
        self._policy = policy or RestartPolicy()
        self._children: dict[str, Child] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._is_ready = False
        self._is_stopping = False

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._tend(spec), name=spec.name) for spec in self._specs]
        for task in self._tasks:
            task.add_done_callback(self._notice_defect)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def pids(self) -> dict[str, int]:
        """Of the children that are alive."""
        return {name: child.pid for name, child in self._children.items()}

    def mark_ready(self) -> None:
        """From now on a death is an accident: the child is started again and the others serve on."""
        self._is_ready = True

    async def during(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`. Raises ChildFailedError as soon as the children have failed."""
        task = asyncio.ensure_future(work)
        ends: list[asyncio.Future[Any]] = [task, self._failure]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self._failure.result()
            return await task
        finally:
            task.cancel()
            await asyncio.wait([task])

    def kill(self) -> None:
        """End all at once, without asking."""
        self._is_stopping = True
        for child in self._children.values():
            child.send(signal.SIGKILL)

    async def stop(self) -> None:
        """SIGTERM, STOP_S of patience, SIGKILL. Cancelled in the meantime: SIGKILL at once. Idempotent."""
        self._is_stopping = True
        for task in self._tasks:
            if task.get_name() not in self._children:
                task.cancel()
        try:
            async with asyncio.timeout(STOP_S):
                await self._terminate([spec.name for spec in self._specs if spec.stops_first])
                await self._terminate([spec.name for spec in self._specs])
        except TimeoutError:
            pass
        finally:
            self.kill()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        self._failure.cancel()

    async def _terminate(self, names: Sequence[str]) -> None:
        for name in names:
            if (child := self._children.get(name)) is not None:
                child.send(signal.SIGTERM)
        if tasks := [task for task in self._tasks if task.get_name() in names]:
            await asyncio.wait(tasks)

    async def _tend(self, spec: ChildSpec) -> None:
        num_deaths = 0
        while not self._is_stopping:
            death = await self._live(spec)
            if self._is_stopping:
                return
            num_deaths = 1 if death.lived_s >= self._policy.steady_s else num_deaths + 1
            if not self._is_ready and self._policy.gives_up_start(death, num_deaths):
                self._fail(f"{spec.name} cannot start: {death}")
                return
            pause_s = self._policy.pause_s(num_deaths) if self._policy.enabled else None
            self._listener.died(death, pause_s)
            if pause_s is None:
                self._fail_if_all_are_dead()
                return
            await asyncio.sleep(pause_s)

    async def _live(self, spec: ChildSpec) -> Death:
        """One life of the child."""
        child = self._children[spec.name] = await Child.start(spec, self._listener.line)
        if self._is_stopping:
            child.send(signal.SIGTERM)
        try:
            return await child.wait()
        finally:
            # Whatever ends our watch ends the child, and with it all that it started.
            child.send(signal.SIGKILL)
            del self._children[spec.name]

    def _fail_if_all_are_dead(self) -> None:
        if not self._children:
            self._fail("all processes are dead")

    def _notice_defect(self, task: asyncio.Task[None]) -> None:
        """A child that could not even be spawned."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(f"{task.get_name()}: {error}")

    def _fail(self, message: str) -> None:
        if not self._failure.done():
            self._failure.set_exception(ChildFailedError(message))
            self._failure.exception()


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[str]:
    """Lines as text; one longer than _MAX_LINE_BYTES comes in pieces."""
    rest = b""
    while data := await reader.read(_MAX_LINE_BYTES):
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace").rstrip("\r")
        if len(rest) >= _MAX_LINE_BYTES:
            yield rest.decode(errors="replace")
            rest = b""
    if rest:
        yield rest.decode(errors="replace")


def _before_exec(cores: tuple[int, ...]) -> Callable[[], None] | None:
    """What the child does before it becomes its program: die with us (even when we are killed), keep to its cores."""
    if not sys.platform.startswith("linux"):
        return None
    # Looked up here: between fork and exec as little as possible may happen.
    prctl, parent = ctypes.CDLL(None, use_errno=True).prctl, os.getpid()

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
        if cores:
            os.sched_setaffinity(0, cores)

    return prepare

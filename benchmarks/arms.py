"""The processes that are compared: each loads its engine once, and works only while it is asked."""

import ctypes
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class ArmSpec:
    name: str
    command: tuple[str, ...]
    cores: tuple[int, ...]
    """The whole process may use these."""
    environment: Mapping[str, str] = field(default_factory=dict)
    max_batch: int = 1 << 30


@dataclass(frozen=True, slots=True)
class Answer:
    wall_s: float
    output_tokens: int
    tokens: tuple[int, ...]
    """Those of the first prompt."""
    own_cores: float
    """CPU seconds a second of the arm itself."""
    other_cores: float
    """CPU seconds a second of everybody else on this machine, meanwhile."""


class ArmFailedError(Exception):
    """An arm ended, with the last lines that it said."""


class Arm:
    """A process that talks as benchmarks/peers/arm.py does. Stopped by SIGSTOP between questions: it cannot disturb."""

    def __init__(self, spec: ArmSpec, log: Path) -> None:
        self.spec = spec
        self._log = log
        began = time.monotonic()
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                spec.command,
                env={**os.environ, "OMP_NUM_THREADS": str(len(spec.cores)), **spec.environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
                preexec_fn=_before_exec(spec.cores),
            )
        try:
            self.about: dict[str, Any] = self._read()
        except BaseException:
            self.end()
            raise
        self.started_in_s = time.monotonic() - began
        self._signal(signal.SIGSTOP)

    def ask(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> Answer:
        """Raises ArmFailedError."""
        self._signal(signal.SIGCONT)
        before = _usage(self._process.pid)
        line = json.dumps({"prompts": prompts, "output_tokens": output_tokens})
        try:
            print(line, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._failure() from None
        said = self._read()
        own, everybody, seconds = (b - a for a, b in zip(before, _usage(self._process.pid), strict=True))
        self._signal(signal.SIGSTOP)
        return Answer(
            wall_s=said["wall_s"],
            output_tokens=said["output_tokens"],
            tokens=tuple(said["tokens"]),
            own_cores=own / seconds,
            other_cores=max(0.0, everybody - own) / seconds,
        )

    def end(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise self._failure()
        message: dict[str, Any] = json.loads(line)
        return message

    def _failure(self) -> ArmFailedError:
        last = self._log.read_text(errors="replace").strip().splitlines()[-5:]
        return ArmFailedError(f"{self.spec.name} ended: " + " | ".join(last))

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)


def _before_exec(cores: Sequence[int]) -> Callable[[], None]:
    """Keep to the cores, and die with us: who is stopped would never learn that nobody will ask again."""
    prctl = ctypes.CDLL(None).prctl

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.sched_setaffinity(0, cores)

    return prepare


def _usage(pid: int) -> tuple[float, float, float]:
    """CPU seconds of a process with its children, of the whole machine, and the time."""
    process = psutil.Process(pid)
    own = sum(_cpu_s(p) for p in [process, *process.children(recursive=True)])
    times = psutil.cpu_times()
    return own, times.user + times.nice + times.system, time.monotonic()


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)

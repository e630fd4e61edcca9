"""A cluster of real processes for a test: own ports, own secret, logs in files, and nobody left behind."""

import asyncio
import ctypes
import itertools
import os
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import httpx
import openai

from tailrace.config import base_environment
from tailrace.messages import LedgerReport
from tailrace.rpc.client import Peer

Role = Literal["gateway", "prefill", "decode", "kvstore"]
MODEL = "test-model"
START_S = 120.0
"""Others may use the machine as well: patience costs nothing when all is well."""
_STOP_S = 15.0
_LAST_BYTES = 6000
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True, eq=False)
class Process:
    """A service and the file that it writes to."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.popen.pid

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait(_STOP_S)

    def end(self) -> int:
        """SIGTERM; its exit code."""
        self.popen.terminate()
        return self.popen.wait(_STOP_S)

    def wait(self, timeout_s: float = START_S) -> int:
        return self.popen.wait(timeout_s)

    def cpu_s(self) -> float:
        """User and system time so far, all threads."""
        columns = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(columns[11]) + int(columns[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Ledger:
    """What a worker says of its blocks."""

    worker_id: str
    total: int
    free: int
    active: int
    cached: int
    lent: int
    landing: int
    quarantined: int
    holdings: list[Any]

    @property
    def is_idle(self) -> bool:
        return self.free + self.cached == self.total and not self.holdings


class Cluster:
    """One gateway; workers are started by the test, any number of them.

    Options are fields of the configuration (`num_blocks=64`); those given here go to every worker, those of `gateway`
    to the gateway. When the block is left by an exception, the last lines of every log are printed.
    """

    def __init__(self, model: Path, *, gateway: dict[str, Any] | None = None, **options: Any) -> None:
        self.model = model
        self.port, self.grpc_port = free_ports(2)
        self.url = f"http://127.0.0.1:{self.port}"
        self.processes: dict[str, Process] = {}
        self.secret = secrets.token_hex(16)
        self._addresses: dict[str, str] = {}
        self._gateway_options = gateway or {}
        self._options = options
        self._logs = tempfile.TemporaryDirectory(prefix="tailrace-test-")
        self._http = httpx.Client(base_url=self.url, trust_env=False, timeout=60.0)

    # -- life ---------------------------------------------------------------------------------------------------------

    def sibling(self) -> "Cluster":
        """Another gateway, which workers of this one may join as well."""
        other = Cluster(self.model, gateway=self._gateway_options, **self._options)
        other.secret = self.secret
        return other

    def __enter__(self) -> Self:
        try:
            self.start("gateway", "gateway", **self._gateway_options)
            self.wait_until(self.is_up, "the gateway answers")
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            print(self.logs())
        for process in self.processes.values():
            process.popen.kill()
        for process in self.processes.values():
            process.popen.wait(_STOP_S)
        self._http.close()
        self._logs.cleanup()

    def start(self, role: Role, name: str, **options: Any) -> Process:
        """Starts a process and returns at once."""
        environment = {
            **base_environment(),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "GRPC_VERBOSITY": "ERROR",
            "PYTHONUNBUFFERED": "1",
            **{f"TAILRACE_{key.upper()}": str(value) for key, value in self._settings(role, name, options).items()},
        }
        log = Path(self._logs.name) / f"{name}-{len(self.processes)}.log"
        with log.open("wb") as output:
            popen = subprocess.Popen(
                [sys.executable, "-m", f"services.{role}.main"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_parent(),
            )
        process = self.processes[f"{name}#{popen.pid}"] = Process(name, popen, log)
        return process

    def _settings(self, role: Role, name: str, options: dict[str, Any]) -> dict[str, Any]:
        common = {"secret": self.secret, "model": self.model}
        if role == "gateway":
            mine = {"port": self.port, "grpc_port": self.grpc_port, "served_model_name": MODEL}
            return {**common, **mine, **options}
        [port] = free_ports(1)
        self._addresses[name] = f"127.0.0.1:{port}"
        if role == "kvstore":
            join = f"127.0.0.1:{self.grpc_port}"
            return {"secret": self.secret, "worker_id": name, "join": join, "port": port, **options}
        mine = {"worker_id": name, "join": f"127.0.0.1:{self.grpc_port}", "port": port, "threads": 1}
        return {**common, **mine, **self._options, **options}

    def start_workers(self, *, prefill: int = 1, decode: int = 1, **options: Any) -> Self:
        """`prefill-0`, `decode-0` and so on, and waits until all of them serve."""
        for index in range(prefill):
            self.start("prefill", f"prefill-{index}", **options)
        for index in range(decode):
            self.start("decode", f"decode-{index}", **options)
        return self.wait_for(*(f"prefill-{i}" for i in range(prefill)), *(f"decode-{i}" for i in range(decode)))

    def process(self, name: str) -> Process:
        """The latest of that name."""
        return next(p for p in reversed(self.processes.values()) if p.name == name)

    def address(self, name: str) -> str:
        """Of a worker's or a store's gRPC server."""
        return self._addresses[name]

    # -- looking ------------------------------------------------------------------------------------------------------

    def get(self, path: str) -> httpx.Response:
        return self._http.get(path)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self._http.post(path, json={"model": MODEL, **body})

    def complete(self, prompt: str | list[int], **options: Any) -> str:
        """Greedy; the text."""
        body = {"prompt": prompt, "temperature": 0, "ignore_eos": True, **options}
        response = self.post("/v1/completions", **body)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])

    def ledgers(self) -> dict[str, Ledger]:
        """Of all workers that answer."""
        return self.parse_ledgers(self.get("/debug/kv"))

    @staticmethod
    def parse_ledgers(response: httpx.Response) -> dict[str, Ledger]:
        names = [field.name for field in fields(Ledger)]
        ledgers = [Ledger(**{name: worker[name] for name in names}) for worker in response.json()["workers"]]
        return {ledger.worker_id: ledger for ledger in ledgers}

    def workers(self) -> set[str]:
        return set(self.ledgers())

    async def watch(self, name: str, condition: Callable[[LedgerReport], bool], timeout_s: float = 30.0) -> None:
        """Asks one worker itself, as often as it answers: through the gateway, all would wait for the slowest."""
        peer = Peer(self._addresses[name], self.secret.encode())
        try:
            async with asyncio.timeout(timeout_s):
                while not condition(await peer.ledger()):  # noqa: ASYNC110 - another process: nothing to wait on
                    await asyncio.sleep(0.001)
        finally:
            await peer.close()

    def metric(self, name: str, **labels: str) -> float:
        """The sum over all label sets of a gateway metric that have these labels; 0 when there is none."""
        wanted = "".join(rf'(?=[^}}]*{key}="{value}")' for key, value in labels.items())
        sample = rf"^{re.escape(name)}(?:{{{wanted}[^}}]*}}){'' if labels else '?'} (\S+)$"
        found = re.findall(sample, self.get("/metrics").text, re.MULTILINE)
        return sum(map(float, found))

    def client(self) -> openai.AsyncOpenAI:
        """Without retries: a test wants to see the first answer."""
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1",
            api_key="unused",
            max_retries=0,
            timeout=120.0,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False, limits=httpx.Limits(max_connections=256)),
        )

    # -- waiting ------------------------------------------------------------------------------------------------------

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = START_S) -> Self:
        deadline = time.monotonic() + timeout_s
        while not condition():
            for process in self.processes.values():
                died = process.popen.poll() not in (None, 0, -signal.SIGKILL, -signal.SIGTERM)
                assert not died, f"waiting until {what}: {process.name} died: {process.said()[-_LAST_BYTES:]}"
            assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
            time.sleep(0.02)
        return self

    def wait_for(self, *names: str) -> Self:
        """Exactly these workers are attached."""
        return self.wait_until(lambda: self.workers() == set(names), f"the workers are {', '.join(names)}")

    def wait_until_idle(self, timeout_s: float) -> dict[str, Ledger]:
        """Every block of every worker is free or cached, and nobody holds anything."""
        last: dict[str, Ledger] = {}

        def is_idle() -> bool:
            last.update(self.ledgers())
            return all(ledger.is_idle for ledger in last.values())

        try:
            self.wait_until(is_idle, "every block is back", timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}: {last}") from None
        return last

    def logs(self) -> str:
        """The last of what everyone said."""
        heads = (f"----- {p.name} (pid {p.pid}, exit code {p.popen.poll()})" for p in self.processes.values())
        tails = (p.said()[-_LAST_BYTES:] for p in self.processes.values())
        return "\n".join(f"{head}\n{tail}" for head, tail in zip(heads, tails, strict=True))

    def is_up(self) -> bool:
        try:
            return self.get("/health").status_code == 200
        except httpx.TransportError:
            return False


def free_ports(count: int) -> list[int]:
    """Different ports that nobody uses now, and that no connection is given before they are listened on."""
    below_ephemeral = random.SystemRandom().sample(range(10_000, 32_000), 1000)
    return list(itertools.islice(filter(_is_free, below_ephemeral), count))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _die_with_parent() -> Callable[[], None]:
    """Runs in the child: it is killed when the test run is, however that ends."""
    prctl = ctypes.CDLL(None).prctl

    def set_signal() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    return set_signal


def run_to_end(role: Role, **options: Any) -> tuple[int, str]:
    """A service that is expected to give up at once: its exit code and all that it said."""
    environment = {
        **base_environment(),
        "OMP_NUM_THREADS": "1",
        "GRPC_VERBOSITY": "ERROR",
        **{f"TAILRACE_{key.upper()}": str(value) for key, value in options.items()},
    }
    command = [sys.executable, "-m", f"services.{role}.main"]
    ended = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=START_S,
        check=False,
    )
    return ended.returncode, ended.stdout.decode(errors="replace")

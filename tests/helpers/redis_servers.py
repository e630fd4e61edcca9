"""Real Redis servers on loopback, with nothing on disk, ended with the test."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.helpers.cluster import _die_with_parent, free_ports

START_S = 20.0


def is_installed() -> bool:
    return shutil.which("redis-server") is not None and shutil.which("redis-cli") is not None


@dataclass(frozen=True)
class Certificate:
    """Of 127.0.0.1, and of the authority that signed it: itself."""

    cert: Path
    key: Path

    @property
    def ca(self) -> Path:
        return self.cert

    @classmethod
    def make(cls, directory: Path) -> Self:
        if (openssl := shutil.which("openssl")) is None:
            pytest.skip("no openssl to make a certificate with")
        made = cls(directory / "cert.pem", directory / "key.pem")
        what = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        about = ["-subj", "/CN=redis", "-addext", "subjectAltName=IP:127.0.0.1"]
        files = ["-keyout", str(made.key), "-out", str(made.cert)]
        subprocess.run([openssl, "req", "-x509", *what, *about, *files], check=True, capture_output=True)
        return made


class RedisServer:
    """`options` are redis-server's own, without the dashes: `maxmemory="2mb"`. With `tls` it speaks nothing else."""

    def __init__(self, port: int = 0, *, tls: "Certificate | None" = None, **options: str) -> None:
        if not is_installed() and not os.environ.get("CI"):
            pytest.skip("redis-server is not installed")
        self.port = port or free_ports(1)[0]
        self.tls = tls
        self._options = options
        self._directory = tempfile.TemporaryDirectory(prefix="tailrace-redis-")
        self._popen: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def directory(self) -> Path:
        return Path(self._directory.name)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
        self._directory.cleanup()

    def start(self) -> None:
        """Empty, whatever it held before."""
        self._popen = subprocess.Popen(
            self._command(),
            stdin=subprocess.DEVNULL,
            stdout=(self.directory / "log").open("ab"),
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent(),
        )
        self.wait_until_up()

    def _command(self) -> list[str]:
        options = {**self._ports(), "bind": "127.0.0.1", "save": "", "appendonly": "no", **self._options}
        words = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", *_words(value))]
        return ["redis-server", "--dir", self._directory.name, *words]

    def _ports(self) -> dict[str, str]:
        if self.tls is None:
            return {"port": str(self.port)}
        files = {"tls_cert_file": str(self.tls.cert), "tls_key_file": str(self.tls.key)}
        others = {"tls_ca_cert_file": str(self.tls.ca), "tls_auth_clients": "no", "tls_replication": "yes"}
        return {"port": "0", "tls_port": str(self.port), **files, **others}

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + START_S
        while True:
            try:
                with contextlib.closing(self.client()) as client:
                    client.ping()
                return
            except (redis.AuthenticationError, redis.exceptions.NoPermissionError):
                return
            except redis.RedisError:
                assert time.monotonic() < deadline, (self.directory / "log").read_text()
                time.sleep(0.01)

    def client(self, password: str | None = None) -> redis.Redis:
        """Which gives up at once: the library's own pauses between attempts are seconds."""
        tls = {"ssl": True, "ssl_ca_certs": str(self.tls.ca)} if self.tls else {}
        return redis.Redis(
            host="127.0.0.1",
            port=self.port,
            password=password,
            socket_timeout=5.0,
            retry=Retry(NoBackoff(), 0),
            **tls,
        )

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """It answers nobody meanwhile, and keeps its connections."""
        assert self._popen is not None
        self._popen.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._popen.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self._popen is not None:
            self._popen.kill()
            self._popen.wait(10)
            self._popen = None


class Sentinel(RedisServer):
    """Watches one master, alone: its word is enough for a failover."""

    def __init__(self, service: str, master: RedisServer, *, password: str, master_password: str) -> None:
        super().__init__(tls=master.tls)
        self.service = service
        self._lines = (
            *(f"{name.replace('_', '-')} {value}" for name, value in self._ports().items()),
            "bind 127.0.0.1",
            f"requirepass {password}",
            f"sentinel monitor {service} 127.0.0.1 {master.port} 1",
            f"sentinel auth-pass {service} {master_password}",
            f"sentinel down-after-milliseconds {service} 500",
            f"sentinel failover-timeout {service} 3000",
        )
        self._password = password

    def _command(self) -> list[str]:
        path = self.directory / "sentinel.conf"
        path.write_text("\n".join(self._lines) + "\n")
        return ["redis-server", str(path), "--sentinel"]

    def knows_a_replica(self) -> bool:
        with contextlib.closing(self.client(self._password)) as client:
            replicas = client.execute_command("SENTINEL REPLICAS", self.service)
            return any(b"ok" in told for told in map(_flat, replicas))


def _flat(told: object) -> list[object]:
    """Names and values: the library tells some answers as dictionaries."""
    return list(told.values()) if isinstance(told, dict) else list(told)


def _words(value: str) -> list[str]:
    return value.split(" ") if value else [""]


@contextlib.contextmanager
def redis_cluster(num_nodes: int = 3) -> Iterator[list[RedisServer]]:
    """Masters without replicas, all slots covered."""
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(cluster_node()) for _ in range(num_nodes)]
        join_nodes(nodes)
        yield nodes


def join_nodes(nodes: Sequence[RedisServer], *, replicas: int = 0) -> None:
    addresses = [f"127.0.0.1:{node.port}" for node in nodes]
    options = ["--cluster-replicas", str(replicas), "--cluster-yes"]
    command = ["redis-cli", "--cluster", "create", *addresses, *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60)
    wait_until_ready(nodes)


def wait_until_ready(nodes: Sequence[RedisServer]) -> None:
    deadline = time.monotonic() + START_S
    while not all(is_cluster_ready(node) for node in nodes):
        assert time.monotonic() < deadline, "the cluster does not come up"
        time.sleep(0.02)


def cluster_node() -> RedisServer:
    port, bus = free_ports(2)
    return RedisServer(port, cluster_enabled="yes", cluster_port=str(bus), cluster_node_timeout="2000")


def is_cluster_ready(node: RedisServer) -> bool:
    with contextlib.closing(node.client()) as client:
        info = client.execute_command("CLUSTER INFO")
        links = client.info("replication").get("master_link_status", "up")
        return info["cluster_state"] == "ok" and links == "up"


def num_masters(node: RedisServer) -> int:
    """That the node believes to be there."""
    with contextlib.closing(node.client()) as client:
        lines = client.execute_command("CLUSTER NODES").values()
        return sum("master" in line["flags"] and "fail" not in line["flags"] for line in lines)

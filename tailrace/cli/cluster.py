"""A whole cluster on this machine: one gateway and its workers as child processes."""

import asyncio
import errno
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tailrace.cli.supervisor import ChildSpec, Listener, RestartPolicy, Supervisor
from tailrace.config import UpConfig, base_environment
from tailrace.cores import Machine, Share, divide, this_machine, thread_environment, without_thread_placement
from tailrace.errors import ConfigError

STORE = "kvstore"
"""The only one of its machine."""
_POLL_S = 0.1
_ANY_HOST = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - what a client dials instead


@dataclass(frozen=True, slots=True)
class Ports:
    """Of this machine, for the servers that others of the cluster dial."""

    http: int
    grpc: int
    """Of the gateway."""
    store: int | None = None
    """None: no store."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster that can serve."""

    base_url: str
    """http://host:port, without /v1."""
    started_in_s: float
    supervisor: Supervisor

    @property
    def api_url(self) -> str:
        return f"{self.base_url}/v1"


@asynccontextmanager
async def running_cluster(
    config: UpConfig, model: Path, listener: Listener, machine: Machine | None = None
) -> AsyncIterator[Cluster]:
    """Start it, wait until it can serve, and end all of it afterwards.

    `model` is the directory of the resolved model, `machine` what its workers may use (None: all of this one). Raises
    ConfigError when the port is taken, and ChildFailedError when a child cannot start.
    """
    began = time.monotonic()
    port = free_port(config.host, config.port)
    ports = Ports(port, free_port("127.0.0.1"), free_port("127.0.0.1") if config.has_store else None)
    specs = plan_children(config, model, ports, machine=machine or this_machine())
    base_url = http_url(config.host, port)
    async with Supervisor(specs, listener, RestartPolicy(enabled=config.restart)) as supervisor:
        await supervisor.during(_until_ready(base_url, config))
        supervisor.mark_ready()
        yield Cluster(base_url, time.monotonic() - began, supervisor)


def plan_children(config: UpConfig, model: Path, ports: Ports, *, machine: Machine) -> tuple[ChildSpec, ...]:
    """The gateway, the store if there is one, then the workers, with the cores divided among the workers."""
    common = {"parent_pid": os.getpid(), "secret": config.secret.get_secret_value() or secrets.token_hex(32)}
    shared = {**common, "model": str(model), "served_model_name": config.model_names}
    gateway = config.gateway(**shared, port=ports.http, grpc_host="127.0.0.1", grpc_port=ports.grpc)
    children = [_child("gateway", "gateway", gateway.to_environment())]
    joining: dict[str, Any] = {"join": (f"127.0.0.1:{ports.grpc}",)}
    if ports.store is not None:
        store = config.store(**common, **joining, worker_id=_worker_id(config, STORE), port=ports.store)
        children.append(_child(STORE, "kvstore", store.to_environment()))
        joining["store"] = f"127.0.0.1:{ports.store}"
    names = [f"prefill-{i}" for i in range(config.prefill)] + [f"decode-{i}" for i in range(config.decode)]
    for name, share in zip(names, worker_shares(config, machine), strict=True):
        worker = config.worker(**shared, **joining, worker_id=_worker_id(config, name), threads=share.threads)
        environment = {**worker.to_environment(), **thread_environment(share.threads)}
        children.append(_child(name, name.partition("-")[0], environment, share.cores))
    return tuple(children)


def _worker_id(config: UpConfig, name: str) -> str:
    """In Redis the workers of several such clusters meet, so there a name is this one's alone."""
    if config.redis_url is None:
        return name
    host = re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())[:32]
    return f"{name}-{host}-{os.getpid()}"


def worker_shares(config: UpConfig, machine: Machine) -> list[Share]:
    """Prefill workers first."""
    return divide(machine, config.prefill + config.decode, threads=config.threads, pin=config.pin_cores)


def free_port(host: str, port: int = 0) -> int:
    """`port` itself, or any free one for 0. Raises ConfigError when nobody could listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            why = (
                "is in use; pass another --port"
                if error.errno == errno.EADDRINUSE
                else f"cannot be used: {error.strerror or error}"
            )
            raise ConfigError(f"port: {host}:{port} {why}", param="port") from None
        return int(probe.getsockname()[1])


def http_url(host: str, port: int) -> str:
    reachable = _ANY_HOST.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def _child(name: str, role: str, environment: dict[str, str], cores: tuple[int, ...] = ()) -> ChildSpec:
    command = (sys.executable, "-m", f"services.{role}.main")
    # Every line comes at once; gRPC's core does not tell of each connection that ends.
    calm = {"PYTHONUNBUFFERED": "1", "GRPC_VERBOSITY": "ERROR"}
    # The gateway ends first: while its last answers are written, the workers are still there.
    inherited = without_thread_placement(base_environment())
    return ChildSpec(name, command, {**calm, **inherited, **environment}, cores, stops_first=role == "gateway")


async def _until_ready(base_url: str, config: UpConfig) -> None:
    async with httpx.AsyncClient(base_url=base_url, trust_env=False, timeout=5.0) as client:
        while not await _is_ready(client, config):  # noqa: ASYNC110 - another process: nothing here to wait on
            await asyncio.sleep(_POLL_S)


async def _is_ready(client: httpx.AsyncClient, config: UpConfig) -> bool:
    """The gateway can serve, and every worker that was asked for is there (it can serve before that)."""
    try:
        if (await client.get("/ready")).status_code != httpx.codes.OK:
            return False
        metrics = (await client.get("/metrics")).text
    except httpx.TransportError:
        return False
    return num_workers(metrics, "prefill") >= config.prefill and num_workers(metrics, "decode") >= config.decode


def num_workers(metrics: str, role: str) -> int:
    """Attached workers of a role, as the gateway's /metrics says."""
    match = re.search(rf'^tailrace_workers{{role="{role}"}} ([0-9.]+)', metrics, re.MULTILINE)
    return int(float(match[1])) if match else 0

"""The NIXL library, and nothing of ours: the only file that imports it, and only when an agent is made."""

import importlib
import logging
import os
import socket
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal

from tailrace.errors import TransferError
from tailrace.transfer.memory import PoolMemory
from tailrace.transfer.nixl_driver import AgentError, Descriptor, NixlDriver
from tailrace.transfer.options import TransferOptions
from tailrace.transfer.proof import rdma_devices

Side = Literal["lends", "reads"]
_MODULES = ("nixl_cu12", "nixl_cu13", "nixl")
_HOST_TLS = "tcp,cma"
"""Cross-memory attach moves the data; tcp only wires peers up, without it UCX finds no handler of peer failures."""


def load_nixl(net_device: str, *, gpu: bool = False) -> ModuleType:
    """Import NIXL, with UCX told where to listen. What the environment already says about UCX is left alone.

    Raises TransferError where no NIXL is installed.
    """
    has_rdma = any(name not in ("", "lo") and ":" in name for name in net_device.split(","))
    tls = _HOST_TLS + (",rc,ud" if has_rdma else "") + (",cuda_copy,cuda_ipc" if gpu else "")
    os.environ.setdefault("UCX_TLS", tls)
    os.environ.setdefault("UCX_NET_DEVICES", net_device)
    show_errors = logging.raiseExceptions
    for name in _MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        _quieten(show_errors)
        return module
    raise TransferError("nixl is not installed (pip install --no-deps nixl-cu12; Linux only)")


def _quieten(show_errors: bool) -> None:
    """NIXL's logger writes to stdout and turns logging's own error reports off; both are the program's to decide."""
    logger = logging.getLogger("nixl")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.WARNING)
    logging.raiseExceptions = show_errors


def can_attach(ucx_tls: str) -> bool:
    """Whether a value of UCX_TLS lets UCX use cross-memory attach."""
    names = {name.strip() for name in ucx_tls.lstrip("^").split(",")}
    listed = bool(names & {"cma", "sm", "shm", "all"})
    return not listed if ucx_tls.startswith("^") else listed


def start_nixl(memory: PoolMemory, options: TransferOptions, side: Side) -> NixlDriver:
    """Make an agent on a thread of its own, and wait for it. Raises TransferError when it cannot be made.

    A process has an agent for each side: where two agents had connections to each other, the reads of both waited for
    their owners (docs/adr/0004). No two cross where one agent only reads and one only lends.
    """
    gpu = memory.memory == "vram"
    load_nixl(options.net_device, gpu=gpu)
    devices = rdma_devices(os.environ["UCX_NET_DEVICES"])
    attach = can_attach(os.environ["UCX_TLS"])
    driver = NixlDriver(lambda: UcxAgent(options, side, gpu=gpu), memory, devices, attach)
    driver.endpoint()
    return driver


class UcxAgent:
    """One NIXL agent with the UCX backend. Made, used and dropped by one thread."""

    def __init__(self, options: TransferOptions, side: Side, *, gpu: bool = False) -> None:
        library = load_nixl(options.net_device, gpu=gpu)
        bindings = sys.modules[f"{library.nixl_agent.__module__.rpartition('.')[0]}._bindings"]
        errors: list[type[Exception]] = [
            e for e in vars(bindings).values() if isinstance(e, type) and issubclass(e, Exception)
        ]
        # The last three are how the bindings refuse numbers that are no addresses.
        self._errors: tuple[type[Exception], ...] = (*errors, TypeError, ValueError, OverflowError)
        self.name = f"{options.role}-{socket.gethostname()}-{os.getpid()}-{options.epoch}-{side}"
        config = library.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        try:
            self._agent = self._call(library.nixl_agent, self.name, config)
        except AgentError as error:
            settings = ", ".join(f"{name}={os.environ[name]}" for name in ("UCX_TLS", "UCX_NET_DEVICES"))
            raise TransferError(f"{error} ({settings})") from error
        if "UCX" not in self._agent.backends:
            raise TransferError("this nixl has no UCX backend")

    def register(self, address: int, num_bytes: int, memory: str, device: int) -> None:
        self._call(self._agent.register_memory, [(address, num_bytes, device, "")], memory.upper())

    def metadata(self) -> bytes:
        return bytes(self._agent.get_agent_metadata())

    def add_peer(self, metadata: bytes) -> str:
        name = self._call(self._agent.add_remote_agent, metadata)
        return name.decode() if isinstance(name, bytes) else str(name)

    def remove_peer(self, name: str) -> None:
        self._call(self._agent.remove_remote_agent, name)

    def prepare(self, peer: str, local: Sequence[Descriptor], remote: Sequence[Descriptor]) -> Any:
        target = self._call(self._agent.get_xfer_descs, _triples(local), local[0].memory.upper())
        source = self._call(self._agent.get_xfer_descs, _triples(remote), remote[0].memory.upper())
        return self._call(self._agent.initialize_xfer, "READ", target, source, peer)

    def post(self, handle: Any) -> bool:
        return self._is_done(self._call(self._agent.transfer, handle))

    def is_done(self, handle: Any) -> bool:
        return self._is_done(self._call(self._agent.check_xfer_state, handle))

    def release(self, handle: Any) -> None:
        self._call(self._agent.release_xfer_handle, handle)

    def progress(self) -> None:
        # Nobody sends us notifications: asking for them is what drives UCX's worker.
        self._call(self._agent.get_new_notifs)

    def _call(self, method: Any, *arguments: Any) -> Any:
        try:
            return method(*arguments)
        except self._errors as error:
            raise AgentError(f"{type(error).__name__}: {error}") from error

    @staticmethod
    def _is_done(state: str) -> bool:
        if state == "ERR":
            raise AgentError("the operation failed")
        return state == "DONE"


def _triples(descriptors: Sequence[Descriptor]) -> list[tuple[int, int, int]]:
    return [(d.address, d.num_bytes, d.device) for d in descriptors]

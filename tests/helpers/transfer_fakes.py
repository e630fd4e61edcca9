"""An agent whose operations end when a test says so."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tailrace.transfer.nixl_driver import AgentError, Descriptor


@dataclass(eq=False)
class FakeHandle:
    peer: str
    local: Sequence[Descriptor]
    remote: Sequence[Descriptor]
    state: str = "PROC"
    """PROC, DONE or ERR; a test changes it."""
    released: bool = False


@dataclass
class FakeAgent:
    """Written by a test, read by the driver's thread. `autopilot`: what a new operation's state is."""

    name: str = "fake"
    autopilot: str = "PROC"
    handles: list[FakeHandle] = field(default_factory=list)
    peers: list[str] = field(default_factory=list)
    registered: list[tuple[int, int]] = field(default_factory=list)
    num_progress: int = 0
    proof: Callable[[], bytes] | None = None
    """What lands when an operation is posted; None: nothing."""

    def register(self, address: int, num_bytes: int, memory: str, device: int) -> None:
        self.registered.append((address, num_bytes))

    def metadata(self) -> bytes:
        return self.name.encode()

    def add_peer(self, metadata: bytes) -> str:
        self.peers.append(metadata.decode())
        return metadata.decode()

    def remove_peer(self, name: str) -> None:
        assert not [handle for handle in self.handles if handle.peer == name and not handle.released]
        self.peers.remove(name)

    def prepare(self, peer: str, local: Sequence[Descriptor], remote: Sequence[Descriptor]) -> Any:
        self.handles.append(FakeHandle(peer, local, remote, self.autopilot))
        return self.handles[-1]

    def post(self, handle: FakeHandle) -> bool:
        if self.proof is not None:
            landed = self.proof()
            ctypes.memmove(handle.local[0].address, landed, len(landed))
        return self.is_done(handle)

    def is_done(self, handle: FakeHandle) -> bool:
        if handle.state == "ERR":
            raise AgentError("lost")
        return handle.state == "DONE"

    def release(self, handle: FakeHandle) -> None:
        assert handle.state != "PROC", "an operation in flight was released"
        handle.released = True

    def progress(self) -> None:
        self.num_progress += 1

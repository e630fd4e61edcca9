"""One thread owns the NIXL agent: it alone posts reads, asks after them and makes progress.

It blocks on its queue while nothing is lent or read, and otherwise polls, sleeping between polls: a spinning poll would
take the interpreter from the engine, and NIXL's own progress thread burns a core.
"""

import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tailrace.errors import TransferError
from tailrace.transfer.endpoints import NixlEndpoint
from tailrace.transfer.memory import PoolMemory
from tailrace.transfer.proof import boot_id

_log = logging.getLogger(__name__)

POLL_S = 0.0005
"""Between polls while a first contact is expected, or a read was posted less than STALLED_AFTER_S ago."""
QUIET_POLL_S = 0.008
"""Between polls while something is merely lent: reads need nothing of the owner, only a late first contact does."""
STALLED_AFTER_S = 1.0
NONCE_BYTES = 32
PROOF_BYTES = NONCE_BYTES + 8
"""A nonce, and behind it how often the owner's thread has gone to sleep and woken up: even while it sleeps."""
_NUM_PROOFS = 16
_PROMPT_POLLS = 8
"""Asked at once after a post, without sleep: a read by cross-memory attach is over by then."""


class AgentError(Exception):
    """The library refused, or an operation ended in error."""


@dataclass(frozen=True, slots=True)
class Descriptor:
    address: int
    num_bytes: int
    memory: str = "dram"
    device: int = 0


class Agent(Protocol):
    """What the driver needs of the library. Every call may raise AgentError; `is_done` then means: over, in error."""

    name: str

    def register(self, address: int, num_bytes: int, memory: str, device: int) -> None: ...
    def metadata(self) -> bytes: ...
    def add_peer(self, metadata: bytes) -> str: ...
    def remove_peer(self, name: str) -> None: ...
    def prepare(self, peer: str, local: Sequence[Descriptor], remote: Sequence[Descriptor]) -> Any: ...
    def post(self, handle: Any) -> bool: ...
    def is_done(self, handle: Any) -> bool: ...
    def release(self, handle: Any) -> None: ...
    def progress(self) -> None: ...


@dataclass(slots=True, eq=False)
class Peer:
    """An owner as the driver knows it. The driver's thread is the only writer."""

    endpoint: NixlEndpoint
    broken: str = ""
    """Why no new read may be posted; empty while all is well."""
    in_flight: int = 0


@dataclass(slots=True, eq=False)
class _Operation:
    """A posted read. Its handle is released when it is over and never before: releasing does not end it."""

    peer: Peer
    handle: Any
    on_end: Callable[[str], None]
    """Called on the driver's thread with the error, or ''."""


class NixlDriver:
    """Every public method may be called from any thread; what it asks for happens on the driver's own."""

    def __init__(
        self,
        make_agent: Callable[[], Agent],
        memory: PoolMemory,
        rdma_devices: tuple[str, ...] = (),
        can_attach: bool = True,
    ) -> None:
        """`can_attach`: the agent is allowed cross-memory attach."""
        self.memory = memory
        self.rdma_devices = rdma_devices
        self.can_attach = can_attach
        self.nonce = secrets.token_bytes(NONCE_BYTES)
        self.scratch = np.zeros(memory.num_blocks, dtype=np.uint64)
        """Where stamps land, at the index of the target block: two reads never share a target."""
        self.proofs = np.zeros((1 + _NUM_PROOFS, PROOF_BYTES), dtype=np.uint8)
        """Row 0 is our proof, for others to read; the proofs of others land in the rows after it."""
        self.proofs[0, :NONCE_BYTES] = np.frombuffer(self.nonce, dtype=np.uint8)
        self._wakes = self.proofs[0, NONCE_BYTES:].view(np.uint64)
        self._wakes[0] = 1
        self.free_proofs = list(range(1, 1 + _NUM_PROOFS))
        self._make_agent = make_agent
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._operations: list[_Operation] = []
        self._peers: dict[str, Peer] = {}
        self._holds = 0
        self._drive_until = 0.0
        self._last_post = 0.0
        self._closing = False
        self._ready = threading.Event()
        self._failure: Exception | None = None
        self._endpoint: NixlEndpoint | None = None
        self._thread = threading.Thread(target=self._run, name="nixl", daemon=True)
        self._thread.start()

    # -- from any thread

    def endpoint(self) -> NixlEndpoint:
        """How others read our pool. Blocks until the agent is made; raises TransferError when it could not be."""
        self._ready.wait()
        if self._endpoint is None:
            raise TransferError(f"nixl could not start: {self._failure}")
        return self._endpoint

    def make_progress_for(self, seconds: float) -> None:
        self.submit(lambda: self._extend(time.monotonic() + seconds))

    @contextmanager
    def progress(self) -> Iterator[None]:
        self.submit(lambda: self._hold(1))
        try:
            yield
        finally:
            self.submit(lambda: self._hold(-1))

    def submit(self, command: Callable[[], None]) -> None:
        self._commands.put(command)

    def close(self, timeout_s: float = 2.0) -> bool:
        """Whether the agent is gone. If not, reads are still in flight: the thread goes on with them, and the pool must
        stay mapped until they are over."""
        self.submit(self._close)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            _log.warning("nixl: reads are still in flight; their memory stays in use")
        return not self._thread.is_alive()

    # -- on the driver's thread

    def _run(self) -> None:
        try:
            self._agent = self._make_agent()
            self._endpoint = self._describe()
        except (AgentError, TransferError, RuntimeError, OSError) as error:
            self._failure = error
            return
        finally:
            self._ready.set()
        while not self._closing or self._operations:
            self._take_commands()
            self._poll()
        for peer in list(self._peers.values()):
            self.give_up(peer, "closed")
        del self._agent

    def _describe(self) -> NixlEndpoint:
        pool, proofs = self.memory, self.proofs
        self._agent.register(pool.address, pool.num_bytes, pool.memory, pool.device)
        for table in (pool.stamps, self.scratch, proofs):
            self._agent.register(int(table.ctypes.data), table.nbytes, "dram", 0)
        return NixlEndpoint(
            agent_name=self._agent.name,
            agent_metadata=self._agent.metadata(),
            pool_address=pool.address,
            stamps_address=pool.stamps_address,
            nonce_address=int(proofs.ctypes.data),
            nonce=self.nonce,
            pid=os.getpid(),
            boot_id=boot_id(),
            memory=pool.memory,
            device=pool.device,
            rdma_devices=self.rdma_devices,
        )

    def _take_commands(self) -> None:
        """Waits for one, for as long as nothing needs a poll; then takes what else is there.

        Nowhere else does the thread wait, and here it leaves the agent alone: a read that it carried out for a needer
        finds it awake, and one that finds it asleep was not carried out by it.
        """
        self._wakes += 1
        try:
            command = self._commands.get(timeout=self._patience())
        except queue.Empty:
            return
        finally:
            self._wakes += 1
        command()
        while not self._commands.empty():
            self._commands.get()()

    def _patience(self) -> float | None:
        now = time.monotonic()
        if now < self._drive_until or (self._operations and now - self._last_post < STALLED_AFTER_S):
            return POLL_S
        if self._operations or self._holds:
            return QUIET_POLL_S
        return 0.0 if self._closing else None

    def _poll(self) -> None:
        if self._holds or self._operations or time.monotonic() < self._drive_until:
            try:
                self._agent.progress()
            except AgentError as error:
                _log.warning("nixl: no progress: %s", error)
        for operation in list(self._operations):
            self._ask(operation)

    def _ask(self, operation: _Operation) -> None:
        try:
            if not self._agent.is_done(operation.handle):
                return
            error = ""
        except AgentError as failure:
            error = str(failure)
        self._operations.remove(operation)
        self._end(operation, error)

    def read(
        self, peer: Peer, local: Sequence[Descriptor], remote: Sequence[Descriptor], on_end: Callable[[str], None]
    ) -> None:
        """Post one read; `on_end` is called once it is over, with its error or ''. On the driver's thread only."""
        if peer.broken:
            on_end(peer.broken)
            return
        peer.in_flight += 1
        self._last_post = time.monotonic()
        operation = _Operation(peer, None, on_end)
        try:
            operation.handle = self._agent.prepare(peer.endpoint.agent_name, local, remote)
            done = self._agent.post(operation.handle) or self._is_done_promptly(operation.handle)
        except AgentError as error:
            self._end(operation, str(error))
            return
        if done:
            self._end(operation, "")
        else:
            self._operations.append(operation)

    def _is_done_promptly(self, handle: Any) -> bool:
        return any(self._agent.is_done(handle) for _ in range(_PROMPT_POLLS))

    def _end(self, operation: _Operation, error: str) -> None:
        """The operation is over. A failed one takes its peer with it, once the peer's other operations are over too."""
        peer = operation.peer
        if operation.handle is not None:
            self._release(operation.handle)
        if error:
            peer.broken = peer.broken or error
        operation.on_end(error)
        peer.in_flight -= 1
        self._evict_if_over(peer)

    def _release(self, handle: Any) -> None:
        try:
            self._agent.release(handle)
        except AgentError as error:
            _log.warning("nixl: a finished read could not be released: %s", error)

    def introduce(self, endpoint: NixlEndpoint) -> Peer:
        """Raises AgentError when the metadata is not that of the agent that the endpoint names."""
        known = self._peers.get(endpoint.agent_name)
        if known is not None and not known.broken:
            return known
        if known is not None:
            raise AgentError(f"{endpoint.agent_name} has failed and still has reads in flight")
        name = self._agent.add_peer(endpoint.agent_metadata)
        if name != endpoint.agent_name:
            self._agent.remove_peer(name)
            raise AgentError(f"the metadata is that of {name}, not of {endpoint.agent_name}")
        peer = self._peers[name] = Peer(endpoint)
        return peer

    def give_up(self, peer: Peer, reason: str) -> None:
        """No new reads; those in flight go on until they are over, and then the agent forgets the peer."""
        peer.broken = peer.broken or reason
        self._evict_if_over(peer)

    def _evict_if_over(self, peer: Peer) -> None:
        name = peer.endpoint.agent_name
        if not peer.broken or peer.in_flight or self._peers.get(name) is not peer:
            return
        del self._peers[name]
        try:
            self._agent.remove_peer(name)
        except AgentError as error:
            _log.info("nixl: %s was gone before it was removed: %s", name, error)

    def _hold(self, change: int) -> None:
        self._holds += change

    def _extend(self, until: float) -> None:
        self._drive_until = max(self._drive_until, until)

    def _close(self) -> None:
        self._closing = True
        self._holds, self._drive_until = 0, 0.0

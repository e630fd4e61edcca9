"""The needer's end of `stream`: one connection to one owner, received straight into the pool."""

import asyncio
import queue
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tailrace.errors import TransferError
from tailrace.transfer.endpoints import PeerEndpoints, StreamEndpoint
from tailrace.transfer.frames import (
    MAX_MESSAGE_BYTES,
    ProtocolError,
    ReplyStatus,
    encode_request,
    receive_bytes,
    receive_exact,
    receive_reply,
)
from tailrace.transfer.handshake import Side, greet_owner
from tailrace.transfer.memory import PoolMemory
from tailrace.transfer.options import TransferOptions
from tailrace.transfer.reads import (
    BlockRead,
    PendingRead,
    RateMeter,
    ReadOutcome,
    ReadPlan,
    ReadResult,
    judge,
    plan_read,
)
from tailrace.transfer.sockets import configure, hang_up
from tailrace.transfer.tls import needer_context


@dataclass(frozen=True, slots=True)
class _Job:
    plan: ReadPlan
    pending: PendingRead
    asked_at: float

    def settle(self, outcome: ReadOutcome, message: str = "") -> None:
        elapsed_s = time.monotonic() - self.asked_at
        self.pending.settle(ReadResult(outcome, elapsed_s, self.plan.num_bytes, message))


def open_stream(peer: PeerEndpoints, memory: PoolMemory, options: TransferOptions) -> "StreamLink":
    """Connect and prove both ends; blocks, up to the handshake's deadline.

    Raises TransferError when the owner cannot be reached or is not the one that was met, UnauthenticatedError when
    either end does not know the secret.
    """
    if peer.stream is None:
        raise TransferError(f"{peer.worker_id} offers no stream")
    deadline = time.monotonic() + options.handshake_timeout_s
    try:
        sock = socket.create_connection((peer.stream.host, peer.stream.port), options.handshake_timeout_s)
    except OSError as error:
        raise TransferError(f"stream to {peer.worker_id} at {peer.stream.host}:{peer.stream.port}: {error}") from error
    try:
        return StreamLink(sock, _greet(sock, peer, peer.stream, options, deadline), memory)
    except BaseException:
        sock.close()
        raise


def _greet(
    sock: socket.socket, peer: PeerEndpoints, endpoint: StreamEndpoint, options: TransferOptions, deadline: float
) -> socket.socket:
    try:
        configure(sock)
        secured = _secure(sock, endpoint, options)
        owner = greet_owner(secured, options.secret, Side(options.worker_id, options.epoch), deadline)
        secured.settimeout(None)
    except (OSError, ProtocolError) as error:
        raise TransferError(f"stream to {peer.worker_id}: handshake failed: {error}") from error
    expected = Side(peer.worker_id, peer.epoch, peer.block_bytes, peer.num_blocks)
    if owner != expected:
        raise TransferError(f"stream to {peer.worker_id}: {owner} answers instead of {expected}")
    return secured


def _secure(sock: socket.socket, endpoint: StreamEndpoint, options: TransferOptions) -> socket.socket:
    if endpoint.tls != (options.tls is not None):
        raise ProtocolError(f"TLS: owner={endpoint.tls} needer={options.tls is not None}")
    if options.tls is None:
        return sock
    # A duplicate keeps `sock` a plain handle for hang_up, whatever TLS is doing.
    return needer_context(options.tls).wrap_socket(sock.dup())


class StreamLink:
    """A daemon thread sends one request at a time and receives its blocks; idle, it waits on its queue."""

    transport = "stream"

    def __init__(self, sock: socket.socket, secured: socket.socket, memory: PoolMemory) -> None:
        """`sock` is the plain handle to hang up with; `secured` the same connection, under TLS where that is used."""
        self._sock = sock
        self._secured = secured
        self._memory = memory
        self.rate = RateMeter()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._broken = ""
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="stream-pull", daemon=True)
        self._thread.start()

    @property
    def broken(self) -> bool:
        return bool(self._broken)

    def read(self, reads: Sequence[BlockRead]) -> PendingRead:
        job = _Job(plan_read(reads, self._memory), PendingRead(asyncio.get_running_loop()), time.monotonic())
        with self._lock:
            if not self._ended:
                self._jobs.put(job)
                return job.pending
        job.settle(ReadOutcome.FAILED, self._broken)
        return job.pending

    def abort(self) -> None:
        """Hang up. The thread leaves its receive, and only then settles: afterwards nothing can land. Idempotent."""
        self._break("the needer hung up")
        self._jobs.put(None)

    def join(self) -> None:
        """Blocks until the thread of an aborted link has ended."""
        self._thread.join()

    def _break(self, reason: str) -> None:
        with self._lock:
            self._broken = self._broken or reason
        hang_up(self._sock)

    def _run(self) -> None:
        while not self._broken and (job := self._jobs.get()) is not None:
            self._serve(job)
        with self._lock:
            self._ended = True
        self._secured.close()
        self._sock.close()
        while not self._jobs.empty():
            if (left := self._jobs.get()) is not None:
                left.settle(ReadOutcome.FAILED, self._broken)

    def _serve(self, job: _Job) -> None:
        started = time.monotonic()
        try:
            outcome, message = self._pull(job.plan)
        except (OSError, ProtocolError, ValueError) as error:
            self._break(f"stream broke: {error}")
            outcome, message = ReadOutcome.FAILED, self._broken
        if outcome is ReadOutcome.GOOD:
            self.rate.add(job.plan.num_bytes, time.monotonic() - started)
        job.settle(outcome, message)

    def _pull(self, plan: ReadPlan) -> tuple[ReadOutcome, str]:
        self._secured.sendall(encode_request(plan.runs))
        reply = receive_reply(self._secured)
        if reply.status is ReplyStatus.REFUSED:
            reason = receive_bytes(self._secured, min(reply.count, MAX_MESSAGE_BYTES)).decode(errors="replace")
            return ReadOutcome.FAILED, f"the owner refused: {reason}"
        if reply.count != len(plan.reads):
            raise ProtocolError(f"{reply.count} blocks sent, {len(plan.reads)} asked for")
        for run in plan.runs:
            receive_exact(self._secured, self._memory.bytes_of(run.target_block, run.num_blocks))
        return judge(plan, np.frombuffer(receive_bytes(self._secured, 8 * len(plan.reads)), "<u8"))

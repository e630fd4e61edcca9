"""The stream's bytes: fixed-size little-endian frames, every length bounded before anything is allocated."""

import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from tailrace.transfer.reads import BlockRun

MAGIC = b"TRKV"
VERSION = 1
MAX_RUNS = 1 << 16
MAX_MESSAGE_BYTES = 1024
TORN_STAMP = (1 << 64) - 1
"""Sent for a block whose stamp changed while it was sent; no block is ever lent with it."""

REQUEST = struct.Struct("<4sI")
"""magic, number of runs; then RUN for each."""
RUN = struct.Struct("<II")
"""first block, number of blocks."""
REPLY = struct.Struct("<4sII")
"""magic, status, number of blocks (GOOD: their bytes and stamps follow) or of message bytes (REFUSED)."""


class ProtocolError(Exception):
    """The peer does not speak this protocol; its connection is closed."""


class ReplyStatus(IntEnum):
    GOOD = 0
    REFUSED = 1


@dataclass(frozen=True, slots=True)
class Reply:
    status: ReplyStatus
    count: int


def receive_exact(sock: socket.socket, target: memoryview) -> None:
    """Fill `target`. Raises ConnectionError when the peer closes first."""
    got = 0
    while got < len(target):
        received = sock.recv_into(target[got:])
        if received == 0:
            raise ConnectionError("the peer closed the connection")
        got += received


def receive_bytes(sock: socket.socket, num_bytes: int, deadline: float | None = None) -> bytes:
    """Exactly `num_bytes`. `deadline` (monotonic) bounds the whole of it, however slowly the peer drips."""
    buffer = bytearray(num_bytes)
    got = 0
    while got < num_bytes:
        if deadline is not None:
            sock.settimeout(_seconds_until(deadline))
        received = sock.recv_into(memoryview(buffer)[got:])
        if received == 0:
            raise ConnectionError("the peer closed the connection")
        got += received
    return bytes(buffer)


def _seconds_until(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the peer took too long")
    return left


def encode_request(runs: Sequence[BlockRun]) -> bytes:
    if len(runs) > MAX_RUNS:
        raise ValueError(f"a read of {len(runs)} runs; at most {MAX_RUNS} fit into one request")
    packed = b"".join(RUN.pack(run.source_block, run.num_blocks) for run in runs)
    return REQUEST.pack(MAGIC, len(runs)) + packed


def receive_request(sock: socket.socket) -> list[tuple[int, int]]:
    """(first block, number of blocks) of each run, unchecked against any pool. Raises ProtocolError."""
    magic, num_runs = REQUEST.unpack(receive_bytes(sock, REQUEST.size))
    if magic != MAGIC or not 0 < num_runs <= MAX_RUNS:
        raise ProtocolError(f"not a request of 1 to {MAX_RUNS} runs")
    return list(RUN.iter_unpack(receive_bytes(sock, num_runs * RUN.size)))


def encode_refusal(reason: str) -> bytes:
    message = reason.encode()[:MAX_MESSAGE_BYTES]
    return REPLY.pack(MAGIC, ReplyStatus.REFUSED, len(message)) + message


def receive_reply(sock: socket.socket) -> Reply:
    magic, status, count = REPLY.unpack(receive_bytes(sock, REPLY.size))
    if magic != MAGIC or status not in tuple(ReplyStatus):
        raise ProtocolError("not a reply")
    if status == ReplyStatus.REFUSED and count > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a refusal of {count} bytes")
    return Reply(ReplyStatus(status), count)

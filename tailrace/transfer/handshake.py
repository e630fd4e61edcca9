"""Who is there? Mutual challenge and response with the cluster secret, before anything else is said on a stream.

The needer sends HELLO, the owner CHALLENGE, the needer its PROOF, the owner WELCOME. The last two are HMAC-SHA256 over
all that both have said, under a label of its own for each direction: neither can be replayed or reflected.
"""

import hmac
import secrets
import socket
import struct
from dataclasses import dataclass

from tailrace.errors import UnauthenticatedError
from tailrace.transfer.frames import MAGIC, VERSION, ProtocolError, receive_bytes
from tailrace.transfer.options import MAX_WORKER_ID_BYTES

_NONCE_BYTES = 32
_MAC_BYTES = 32
_SIDE = struct.Struct(f"<4sHHQQQ{_NONCE_BYTES}s")
"""magic, version, bytes of worker id, epoch, block bytes, number of blocks, nonce; then the worker id."""


@dataclass(frozen=True, slots=True)
class Side:
    """What each end says of itself. The pool's shape is the owner's; a needer sends zeros."""

    worker_id: str
    epoch: int
    block_bytes: int = 0
    num_blocks: int = 0


def greet_owner(sock: socket.socket, secret: bytes, me: Side, deadline: float) -> Side:
    """The needer's part. Raises UnauthenticatedError when the owner does not know the secret or refuses our proof."""
    hello = _encode(me)
    sock.sendall(hello)
    owner, challenge = _receive_side(sock, deadline)
    transcript = hello + challenge
    sock.sendall(_mac(secret, b"needer", transcript))
    try:
        welcome = receive_bytes(sock, _MAC_BYTES, deadline)
    except ConnectionError as error:
        raise UnauthenticatedError("the owner refused our proof: do both know the same cluster secret?") from error
    if not hmac.compare_digest(welcome, _mac(secret, b"owner", transcript)):
        raise UnauthenticatedError("the owner does not know the cluster secret")
    return owner


def admit_needer(sock: socket.socket, secret: bytes, me: Side, deadline: float) -> Side:
    """The owner's part. Raises UnauthenticatedError; the caller closes the connection without a word."""
    needer, hello = _receive_side(sock, deadline)
    challenge = _encode(me)
    sock.sendall(challenge)
    transcript = hello + challenge
    proof = receive_bytes(sock, _MAC_BYTES, deadline)
    if not hmac.compare_digest(proof, _mac(secret, b"needer", transcript)):
        raise UnauthenticatedError(f"{needer.worker_id!r} does not know the cluster secret")
    sock.sendall(_mac(secret, b"owner", transcript))
    return needer


def _mac(secret: bytes, label: bytes, transcript: bytes) -> bytes:
    return hmac.digest(secret, label + b"\0" + transcript, "sha256")


def _encode(side: Side) -> bytes:
    name = side.worker_id.encode()
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return _SIDE.pack(MAGIC, VERSION, len(name), side.epoch, side.block_bytes, side.num_blocks, nonce) + name


def _receive_side(sock: socket.socket, deadline: float) -> tuple[Side, bytes]:
    head = receive_bytes(sock, _SIDE.size, deadline)
    magic, version, name_bytes, epoch, block_bytes, num_blocks, _ = _SIDE.unpack(head)
    if magic != MAGIC or version != VERSION or not 0 < name_bytes <= MAX_WORKER_ID_BYTES:
        raise ProtocolError(f"not a handshake of version {VERSION}")
    name = receive_bytes(sock, name_bytes, deadline)
    try:
        return Side(name.decode(), epoch, block_bytes, num_blocks), head + name
    except UnicodeDecodeError as error:
        raise ProtocolError("a worker id that is not UTF-8") from error

"""The owner's end of `stream`: sends blocks straight from the pool, and their stamps after them."""

import logging
import selectors
import socket
import threading
import time
from collections.abc import Sequence

import numpy as np

from tailrace.errors import ConfigError, TailraceError
from tailrace.transfer.endpoints import StreamEndpoint
from tailrace.transfer.frames import (
    MAGIC,
    REPLY,
    TORN_STAMP,
    ProtocolError,
    ReplyStatus,
    encode_refusal,
    receive_request,
)
from tailrace.transfer.handshake import Side, admit_needer
from tailrace.transfer.memory import PoolMemory
from tailrace.transfer.options import TransferOptions
from tailrace.transfer.sockets import configure, hang_up
from tailrace.transfer.tls import owner_context

_log = logging.getLogger(__name__)
_REFUSALS = (TailraceError, ProtocolError, OSError)
"""What ends one connection and nothing else. OSError has ssl.SSLError, TimeoutError and ConnectionError below it."""


class StreamServer:
    """One listening port; a daemon thread accepts, and each needer has a daemon thread that sends to it."""

    def __init__(self, memory: PoolMemory, options: TransferOptions) -> None:
        self._memory = memory
        self._options = options
        self._me = Side(options.worker_id, options.epoch, memory.block_bytes, memory.num_blocks)
        self._tls = owner_context(options.tls) if options.tls else None
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._needers: dict[str, socket.socket] = {}
        self._closing = False
        self._listener = self._listen()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._acceptor = threading.Thread(target=self._accept_all, name="stream-accept", daemon=True)

    def _listen(self) -> socket.socket:
        host, port = self._options.stream_host, self._options.stream_port
        try:
            return socket.create_server((host, port), backlog=64)
        except OSError as error:
            raise ConfigError(f"transfer port {host}:{port}: {error}", param="stream_port") from error

    def start(self) -> None:
        self._acceptor.start()

    def endpoint(self) -> StreamEndpoint:
        host = self._options.advertised_host or self._options.stream_host
        return StreamEndpoint(host, self._listener.getsockname()[1], self._tls is not None)

    def close(self) -> None:
        """Cuts every needer off and waits for the threads: afterwards nobody reads the pool. Called once."""
        with self._lock:
            self._closing = True
            connections = dict(self._connections)
        self._wake_writer.send(b"x") if self._acceptor.is_alive() else self._listener.close()
        for sock, thread in connections.items():
            hang_up(sock)
            thread.join()
        if self._acceptor.is_alive():
            self._acceptor.join()
        self._wake_reader.close()
        self._wake_writer.close()

    def _accept_all(self) -> None:
        with selectors.DefaultSelector() as selector, self._listener:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wake_reader, selectors.EVENT_READ)
            while not self._closing:
                ready = [key.fileobj for key, _ in selector.select()]
                if self._listener in ready:
                    self._accept()

    def _accept(self) -> None:
        try:
            sock, address = self._listener.accept()
        except OSError as error:
            _log.warning("could not accept a needer: %s", error)
            return
        thread = threading.Thread(target=self._serve, args=(sock,), name=f"stream-{address[1]}", daemon=True)
        with self._lock:
            if self._closing or len(self._connections) >= self._options.max_connections:
                _log.warning("refused a needer: %d connections are open", len(self._connections))
                sock.close()
                return
            self._connections[sock] = thread
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        needer: Side | None = None
        secured = sock
        try:
            deadline = time.monotonic() + self._options.handshake_timeout_s
            sock.settimeout(self._options.handshake_timeout_s)
            configure(sock)
            secured = self._secure(sock)
            needer = admit_needer(secured, self._options.secret, self._me, deadline)
            secured.settimeout(None)
            self._fence(needer, sock)
            while True:
                self._answer(secured, receive_request(secured))
        except _REFUSALS as error:
            level = logging.DEBUG if needer else logging.WARNING
            _log.log(level, "stream to %s ended: %s", needer.worker_id if needer else "an unknown peer", error)
        finally:
            self._forget(sock, needer)
            secured.close()
            sock.close()

    def _secure(self, sock: socket.socket) -> socket.socket:
        if self._tls is None:
            return sock
        # A duplicate keeps `sock` a plain handle for hang_up, whatever TLS is doing.
        return self._tls.wrap_socket(sock.dup(), server_side=True)

    def _fence(self, needer: Side, sock: socket.socket) -> None:
        """A needer has one stream: its newest."""
        with self._lock:
            older = self._needers.get(needer.worker_id)
            self._needers[needer.worker_id] = sock
        if older is not None:
            hang_up(older)

    def _forget(self, sock: socket.socket, needer: Side | None) -> None:
        with self._lock:
            self._connections.pop(sock, None)
            if needer is not None and self._needers.get(needer.worker_id) is sock:
                del self._needers[needer.worker_id]

    def _answer(self, sock: socket.socket, runs: Sequence[tuple[int, int]]) -> None:
        refusal = self._refusal(runs)
        if refusal:
            sock.sendall(encode_refusal(refusal))
            return
        blocks = np.concatenate([np.arange(first, first + count) for first, count in runs])
        before = self._memory.stamps[blocks]
        sock.sendall(REPLY.pack(MAGIC, ReplyStatus.GOOD, len(blocks)))
        for first, count in runs:
            sock.sendall(self._memory.bytes_of(first, count))
        # The kernel has copied the last byte: a stamp that is still the same now vouches for all of them.
        after = self._memory.stamps[blocks]
        after[after != before] = TORN_STAMP
        sock.sendall(after.astype("<u8").tobytes())

    def _refusal(self, runs: Sequence[tuple[int, int]]) -> str:
        limit = self._memory.num_blocks
        for first, count in runs:
            if count == 0 or first + count > limit:
                return f"blocks {first} to {first + count - 1} are not in a pool of {limit}"
        total = sum(count for _, count in runs)
        return f"{total} blocks asked for, of a pool of {limit}" if total > limit else ""

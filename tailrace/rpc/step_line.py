"""What a worker says to a gateway, over a connection of its own.

gRPC takes several threads and a wake-up of each for a message (ADR 0015); a plain connection takes none but the loop's
own. The `Attach` stream stays: it offers the line, carries the commands, and its life is the line's.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

from tailrace.errors import TailraceError, WorkerLostError
from tailrace.rpc.gen import worker_pb2
from tailrace.rpc.options import MAX_MESSAGE_BYTES

log = logging.getLogger(__name__)

KEY_BYTES = 32
CONNECT_S = 1.0
"""Also how long a new connection may take to show its key."""
MAX_STRANGERS = 64
"""Connections that have shown no key yet; one more is closed at once."""
_LENGTH_BYTES = 4


class LineWriter:
    """A worker's end of one line, offered over one Attach stream."""

    def __init__(self, port: int) -> None:
        """`port` 0: none is offered."""
        self.key = secrets.token_bytes(KEY_BYTES)
        self._port = port
        self._num_before = 0
        self._has_sent = False
        self._writer: asyncio.StreamWriter | None = None

    @property
    def is_open(self) -> bool:
        """The gateway has opened it, and is to be told everything here from now on."""
        return self._writer is not None

    def open(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def announce(self, message: worker_pb2.AttachResponse) -> None:
        """Of every message that goes over gRPC: the first one makes the offer."""
        if self._port and not self._num_before:
            message.line.port, message.line.key = self._port, self.key
        self._num_before += 1

    async def send(self, message: worker_pb2.AttachResponse, timeout_s: float) -> bool:
        """False when the gateway has left, or has read nothing for so long. The line must be open."""
        assert self._writer is not None
        if self._writer.is_closing():
            return False
        if not self._has_sent:
            self._has_sent, message.num_before = True, self._num_before
        data = message.SerializeToString()
        self._writer.write(len(data).to_bytes(_LENGTH_BYTES, "little") + data)
        try:
            async with asyncio.timeout(timeout_s):
                await self._writer.drain()
        except (TimeoutError, ConnectionError):
            return False
        return True


class StepLines:
    """A worker's listener for the lines that it offers."""

    def __init__(self) -> None:
        self.are_wanted = False
        self._port = 0
        self._offered: dict[bytes, LineWriter] = {}
        self._num_strangers = 0
        self._server: asyncio.Server | None = None

    async def start(self, host: str) -> None:
        """On any free port of `host`. Where none can be had no line is offered, and gRPC carries everything."""
        try:
            self._server = await asyncio.start_server(self._answer, host.strip("[]"), 0, limit=KEY_BYTES)
        except OSError as error:
            log.warning("steps go over gRPC alone: no port to listen on at %s: %s", host, error.strerror or error)
            return
        self._port = self._server.sockets[0].getsockname()[1]

    def stop(self) -> None:
        if self._server is not None:
            self._server.close()

    @contextmanager
    def offer(self) -> Iterator[LineWriter]:
        """A line that can be opened, and lives, until the block is left."""
        line = LineWriter(self._port)
        self._offered[line.key] = line
        try:
            yield line
        finally:
            del self._offered[line.key]
            line.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from its key to its end. The gateway says nothing after the key."""
        try:
            if (line := await self._recognize(reader)) is not None:
                line.open(writer)
                await reader.read(1)
        except ConnectionError:
            pass  # its end, as any other
        finally:
            writer.close()

    async def _recognize(self, reader: asyncio.StreamReader) -> LineWriter | None:
        """Whose key it shows; None for a stranger."""
        if self._num_strangers >= MAX_STRANGERS:
            return None
        self._num_strangers += 1
        try:
            async with asyncio.timeout(CONNECT_S):
                line = self._offered.get(await reader.readexactly(KEY_BYTES))
        except (TimeoutError, asyncio.IncompleteReadError):
            return None
        finally:
            self._num_strangers -= 1
        if line is None or line.is_open:
            log.warning("refused a step line: its key was not offered, or is in use")
            return None
        return line


class LineReader(asyncio.Protocol):
    """A gateway's end of one line. Tries to open it; until it is, and if it cannot be, everything comes over gRPC."""

    def __init__(
        self,
        address: str,
        line: worker_pb2.StepLine,
        take: Callable[[worker_pb2.AttachResponse], None],
        give_up: Callable[[], None],
    ) -> None:
        """`address` is that of the worker's gRPC server; `give_up` ends the Attach stream."""
        self.failure: TailraceError | None = None
        """Why it gave up."""
        self._address = address
        self._key = line.key
        self._take = take
        self._give_up = give_up
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._num_before: int | None = None
        self._num_released = 0
        self._is_closed = False
        self._opening = asyncio.create_task(self._open(line.port), name=f"step line to {address}")

    @property
    def is_dumb(self) -> bool:
        """It is open, and nothing has come."""
        return self._transport is not None and self._num_before is None

    @property
    def is_in_use(self) -> bool:
        """Something has come over it, and so will the rest."""
        return self._num_before is not None and not self._is_closed

    def release(self, num_taken: int) -> None:
        """So many messages of the stream have come over gRPC, and have been taken."""
        self._num_released = num_taken
        if self._buffer:
            self._read()

    def close(self) -> None:
        self._is_closed = True
        self._opening.cancel()
        if self._transport is not None:
            self._transport.abort()

    async def _open(self, port: int) -> None:
        host = self._address.rpartition(":")[0].strip("[]")
        try:
            async with asyncio.timeout(CONNECT_S):
                await asyncio.get_running_loop().create_connection(lambda: self, host, port)
        except OSError as error:  # a timeout is one
            why = error.strerror or type(error).__name__
            log.info("%s: its steps come over gRPC; its port %d cannot be reached: %s", self._address, port, why)

    # -- Protocol -----------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not one by its class
        self._transport.write(self._key)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._read()

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(WorkerLostError(f"{self._address}: its step line broke: {error or 'closed by the worker'}"))

    # -- inside -------------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Takes what is complete, but nothing before what was said earlier over gRPC."""
        buffer = self._buffer
        try:
            while len(buffer) >= _LENGTH_BYTES and not self._is_closed:
                end = _LENGTH_BYTES + int.from_bytes(buffer[:_LENGTH_BYTES], "little")
                if end > MAX_MESSAGE_BYTES:
                    raise WorkerLostError(f"{self._address}: a message of {end} bytes; {MAX_MESSAGE_BYTES} are allowed")
                if len(buffer) < end:
                    return
                message = worker_pb2.AttachResponse.FromString(bytes(buffer[_LENGTH_BYTES:end]))
                if self._num_before is None:
                    self._num_before = message.num_before
                if self._num_released < self._num_before:
                    return
                del buffer[:end]
                self._take(message)
        except TailraceError as error:
            self._fail(error)
        except Exception as error:
            log.exception("what %s said over its step line failed", self._address)
            self._fail(WorkerLostError(f"{self._address}: its step line failed: {type(error).__name__}"))

    def _fail(self, error: TailraceError) -> None:
        if not self._is_closed:
            self.failure = error
            self.close()
            self._give_up()

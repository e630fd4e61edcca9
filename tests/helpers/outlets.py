"""An outlet to a client that a test plays."""

import socket
import time
from array import array

from services.gateway.http_metrics import TokenHistogram
from services.gateway.outlet import Desk, Outlet, TextChunk
from tests.helpers.gateway_app import TOKENIZER, step_writer

CHUNK = TextChunk(b"<", b">")


class Body:
    """What a DirectBody is to an outlet."""

    def __init__(self, socket_fd: int | None) -> None:
        self.socket_fd = socket_fd
        self.rests: list[bytes] = []

    def write_rest(self, rest: bytes) -> None:
        self.rests.append(rest)


class Client:
    """Reads what its outlet writes; the outlet is open."""

    def __init__(self, chunk: TextChunk = CHUNK, *, send_buffer: int | None = None) -> None:
        self.near, self.far = socket.socketpair()
        self.near.setblocking(False)
        self.far.setblocking(False)
        if send_buffer is not None:
            self.near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.icl = TokenHistogram("icl", "gaps", (0.5, 10.0))
        self.body = Body(self.near.fileno())
        outlet = Desk(step_writer(), TOKENIZER.vocabulary, self.icl).outlet(self.body, chunk)  # type: ignore[arg-type]
        assert outlet is not None
        self.outlet: Outlet = outlet
        self.outlet.open(time.monotonic())
        self.data = b""

    def read(self, num_bytes: int = 1 << 20) -> bytes:
        """What has come since the last call."""
        try:
            new = self.far.recv(num_bytes)
        except BlockingIOError:
            new = b""
        self.data += new
        return new

    def chunks(self) -> list[bytes]:
        """Bodies of all chunks that have come as a whole."""
        while self.read():
            pass
        found, rest = [], self.data
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            chunk, end, rest = rest[: int(size, 16)], rest[int(size, 16) :][:2], rest[int(size, 16) + 2 :]
            assert end == b"\r\n"
            found.append(chunk)
        return found

    def tokens(self) -> list[int]:
        """Of chunks of `CHUNK`."""
        by_text = {text: i for i in range(TOKENIZER.vocabulary.num_tokens) if (text := TOKENIZER.vocabulary.text(i))}
        return [by_text[eval(chunk[1:-1])] for chunk in self.chunks()]

    def counts(self) -> array:  # type: ignore[type-arg]
        return self.icl.counts

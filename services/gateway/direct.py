"""Writing a piece of a streamed body to its connection at once.

ASGI has one way to send, a coroutine: a task's wakeup and a walk through every middleware for each token. uvicorn keeps
the connection in the object whose method the application gets as `receive`. This file is the only one that knows so,
by that object's exact class in the pinned version; under any other server nothing is found, and the caller sends as
ASGI says.
"""

import asyncio
import os
import time

from starlette.types import Receive

try:
    from uvicorn.protocols.http import httptools_impl as uvicorn_http
except ImportError:  # no httptools on this platform: uvicorn has another protocol there
    uvicorn_http = None  # type: ignore[assignment]


class DirectBody:
    """The body of one answer whose head has been sent. Its last piece goes through `send`, which ends the answer."""

    __slots__ = ("_flow", "_transport", "socket_fd", "wrote_at")

    def __init__(self, cycle: "uvicorn_http.RequestResponseCycle") -> None:
        self.wrote_at = 0.0
        """Monotonic seconds."""
        self._flow = cycle.flow
        self._transport = cycle.transport
        self.socket_fd = _duplicate(cycle.transport)
        """The connection's socket, for whoever writes past the transport while `is_flushed`. None: nobody may.

        It stays this connection's until `close`, whatever becomes of the transport.
        """

    def close(self) -> None:
        """Nothing is written any more."""
        if self.socket_fd is not None:
            os.close(self.socket_fd)
            self.socket_fd = None

    @property
    def is_flushed(self) -> bool:
        """The socket has all that was written."""
        return not self._transport.get_write_buffer_size()

    def write(self, data: bytes) -> bool:
        """False, and nothing written, when the client is slow to read or has left: `send` knows what to do then.

        `data` is not empty: an empty piece would end the body.
        """
        if self._flow.write_paused or self._transport.is_closing():
            return False
        self.wrote_at = time.monotonic()
        chunk = framed(data)
        try:
            sent = os.write(self.socket_fd, chunk) if self.socket_fd is not None and self.is_flushed else 0
        except BlockingIOError:
            sent = 0
        except OSError:  # the client has left; the transport will notice
            return False
        self.write_rest(chunk[sent:])
        return True

    def write_rest(self, rest: bytes) -> None:
        """Of a framed chunk, what the socket did not take."""
        if rest:
            self._transport.write(rest)


def framed(data: bytes) -> bytes:
    """One chunk of an HTTP/1.1 body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def _duplicate(transport: asyncio.Transport) -> int | None:
    """None for what has no socket of its own, or encrypts what it writes there."""
    connection = transport.get_extra_info("socket")
    if connection is None or transport.get_extra_info("sslcontext") is not None:
        return None
    try:
        return os.dup(connection.fileno())
    except OSError:  # closed, or too many files are open
        return None


def direct_body(receive: Receive) -> DirectBody | None:
    """None under another server, or where the body's framing is not the one that is written here.

    The head must have been sent.
    """
    cycle = getattr(receive, "__self__", None)
    if uvicorn_http is None or type(cycle) is not uvicorn_http.RequestResponseCycle:
        return None
    is_chunked = cycle.chunked_encoding is True and cycle.scope["method"] != "HEAD"
    return DirectBody(cycle) if is_chunked and cycle.response_started else None

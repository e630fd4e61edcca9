"""Writing a piece of a streamed body to its connection at once.

ASGI has one way to send, a coroutine: a task's wakeup and a walk through every middleware for each token. uvicorn keeps
the connection in the object whose method the application gets as `receive`. This file is the only one that knows so,
by that object's exact class in the pinned version; under any other server nothing is found, and the caller sends as
ASGI says.
"""

import time

from starlette.types import Receive

try:
    from uvicorn.protocols.http import httptools_impl as uvicorn_http
except ImportError:  # no httptools on this platform: uvicorn has another protocol there
    uvicorn_http = None  # type: ignore[assignment]


class DirectBody:
    """The body of one answer whose head has been sent. Its last piece goes through `send`, which ends the answer."""

    __slots__ = ("_flow", "_transport", "wrote_at")

    def __init__(self, cycle: "uvicorn_http.RequestResponseCycle") -> None:
        self.wrote_at = 0.0
        """Monotonic seconds."""
        self._flow = cycle.flow
        self._transport = cycle.transport

    def write(self, data: bytes) -> bool:
        """False, and nothing written, when the client is slow to read or has left: `send` knows what to do then.

        `data` is not empty: an empty piece would end the body.
        """
        if self._flow.write_paused or self._transport.is_closing():
            return False
        self.wrote_at = time.monotonic()
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True


def direct_body(receive: Receive) -> DirectBody | None:
    """None under another server, or where the body's framing is not the one that is written here.

    The head must have been sent.
    """
    cycle = getattr(receive, "__self__", None)
    if uvicorn_http is None or type(cycle) is not uvicorn_http.RequestResponseCycle:
        return None
    is_chunked = cycle.chunked_encoding is True and cycle.scope["method"] != "HEAD"
    return DirectBody(cycle) if is_chunked and cycle.response_started else None

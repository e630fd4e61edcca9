"""Server-sent events: one answer written to one client, whatever the client's pace."""

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from fastapi import Response
from starlette.types import Receive, Scope, Send

from services.gateway.answer import Answer
from services.gateway.choice import Delta
from services.gateway.direct import DirectBody, direct_body
from services.gateway.disconnect import cancel_all, client_left
from services.gateway.http_errors import ErrorReply
from services.gateway.http_metrics import HttpMetrics
from services.gateway.openai_response import DONE, AnswerFormat
from services.gateway.outlet import Desk, Outlet
from tailrace.errors import TailraceError
from tailrace.types import FinishReason

_log = logging.getLogger(__name__)
_KEEPALIVE = b": waiting\n\n"
_PIECE_BYTES = 65536
_Piece = tuple[Delta, FinishReason | None]


@dataclass(frozen=True, slots=True)
class StreamOptions:
    opening_wait_s: float = 5.0
    """The status line waits this long for the first token: an error before it still gets a status of its own."""
    keepalive_s: float = 15.0
    """A comment is sent after this much silence, for the proxies in between."""
    slow_client_s: float = 30.0
    """A client that reads nothing for so long is cut."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What waits to be written: at most one piece a choice."""

    pieces: dict[int, _Piece] = field(default_factory=dict)
    is_last: bool = False
    error: BaseException | None = None


class Outbox:
    """Between an answer and its client: what a slow client has not taken yet is joined into one piece a choice."""

    __slots__ = ("_changed", "_error", "_is_last", "_pieces", "is_awaited")

    def __init__(self) -> None:
        self._pieces: dict[int, _Piece] = {}
        self._changed = asyncio.Event()
        self._is_last = False
        self._error: BaseException | None = None
        self.is_awaited = False
        """Whoever takes has written all there was, and waits for more."""

    def put(self, index: int, delta: Delta, reason: FinishReason | None) -> None:
        if index in self._pieces:
            before, _ = self._pieces[index]
            delta = Delta(before.text + delta.text, (*before.tokens, *delta.tokens))
        self._pieces[index] = delta, reason
        self._change()

    def close(self, error: BaseException | None = None) -> None:
        self._is_last, self._error = True, error
        self._change()

    def _change(self) -> None:
        self.is_awaited = False
        self._changed.set()

    async def take(self, timeout_s: float) -> Batch:
        """Everything that waits; empty after `timeout_s` without anything."""
        self.is_awaited = not self._changed.is_set()
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return Batch()
        finally:
            self.is_awaited = False
        self._changed.clear()
        pieces, self._pieces = self._pieces, {}
        return Batch(pieces, self._is_last, self._error)


class EventStream(Response):
    """Follows an answer, which it owns, to its end or to the client's. Is the answer's Reader.

    While the client keeps pace a piece is written as it comes, within the worker's message that brought it; the
    plain ones by the outlet. The rest goes through the outbox and its writer: the head, what a slow client lets wait,
    silence, and the end.
    """

    def __init__(
        self,
        answer: Answer,
        answer_format: AnswerFormat,
        metrics: HttpMetrics,
        options: StreamOptions,
        desk: Desk | None,
        *,
        include_usage: bool,
        request_id: str,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(
            headers={**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}, media_type="text/event-stream"
        )
        del self.headers["content-length"]
        self._answer = answer
        self._format = answer_format
        self._metrics = metrics
        self._options = options
        self._include_usage = include_usage
        self._request_id = request_id
        self._outbox = Outbox()
        self._desk = desk
        self._direct: DirectBody | None = None
        self._outlet: Outlet | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = asyncio.create_task(self._write(scope, receive, send))
        left = asyncio.create_task(client_left(receive))
        try:
            self._answer.follow(self)
            await asyncio.wait((writer, left), return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()
            else:
                self._metrics.disconnects.labels("left").inc()
        finally:
            self._let_go()
            for task in (writer, left):
                task.cancel()
            await self._answer.aclose()
            await cancel_all(writer, left)

    # -- Reader -------------------------------------------------------------------------------------------------------

    def take(self, index: int, delta: Delta, reason: FinishReason | None) -> None:
        body = self._direct
        if body is None or not self._outbox.is_awaited or not body.write(self._format.chunks(index, delta, reason)):
            self._outbox.put(index, delta, reason)
        elif self._outlet is not None and reason is None and body.is_flushed and self._answer.choice(0).is_plain:
            self._outlet.open(body.wrote_at)

    def _connect(self, body: DirectBody) -> None:
        """An answer of one choice gets its short way, closed until a piece has been written directly."""
        self._direct = body
        chunk = self._format.text_chunk(0)
        if self._desk is not None and chunk is not None and self._answer.num_choices == 1:
            self._outlet = self._desk.outlet(body, chunk)
            if self._outlet is not None:
                self._answer.divert(self._outlet)

    def _let_go(self) -> None:
        if self._outlet is not None:
            self._outlet.close()
        if self._direct is not None:
            self._direct.close()
            self._direct = None

    def close(self, error: Exception | None) -> None:
        if error is not None and not isinstance(error, TailraceError):
            _log.error("request %s failed", self._request_id, exc_info=error)
        self._outbox.close(error)

    # -- the writer ---------------------------------------------------------------------------------------------------

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        batch = await self._outbox.take(self._options.opening_wait_s)
        if batch.error is not None and not batch.pieces:
            await ErrorReply.of(batch.error).response()(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        opening = self._format.opening(self._answer.num_choices)
        try:
            while not batch.is_last:
                await self._send(send, (opening + self._chunks(batch)) or _KEEPALIVE, more=True)
                opening = b""
                if self._direct is None and (body := direct_body(receive)) is not None:
                    self._connect(body)
                batch = await self._next_batch()
            await self._send(send, opening + self._chunks(batch) + self._ending(batch.error), more=False)
        except TimeoutError:
            self._metrics.disconnects.labels("slow").inc()
            _log.warning("request %s: its client read nothing for %g s", self._request_id, self._options.slow_client_s)

    async def _next_batch(self) -> Batch:
        """Empty after so much silence that a comment is due."""
        silence_s = self._options.keepalive_s
        while True:
            batch = await self._outbox.take(silence_s)
            silence_s = self._wrote_at() + self._options.keepalive_s - time.monotonic()
            if batch.pieces or batch.is_last or silence_s <= 0:
                return batch

    def _wrote_at(self) -> float:
        """When something was last written directly, in monotonic seconds."""
        times = [way.wrote_at for way in (self._direct, self._outlet) if way is not None]
        return max(times, default=0.0)

    def _chunks(self, batch: Batch) -> bytes:
        return b"".join(self._format.chunks(index, *piece) for index, piece in batch.pieces.items())

    def _ending(self, error: BaseException | None) -> bytes:
        if error is not None:
            return b"data: %b\n\n" % ErrorReply.of(error).body
        return (self._format.usage_chunk(self._answer.usage) if self._include_usage else b"") + DONE

    async def _send(self, send: Send, body: bytes, *, more: bool) -> None:
        """In pieces, before each of which the server waits for a client that is behind. Raises TimeoutError."""
        if self._outlet is not None:
            self._outlet.close()
        while body:
            piece, body = body[:_PIECE_BYTES], body[_PIECE_BYTES:]
            async with asyncio.timeout(self._options.slow_client_s):
                await send({"type": "http.response.body", "body": piece, "more_body": more or bool(body)})

"""Server-sent events: one answer written to one client, whatever the client's pace."""

import asyncio
import logging
from dataclasses import dataclass, field

from fastapi import Response
from starlette.types import Receive, Scope, Send

from services.gateway.answer import Answer
from services.gateway.choice import Delta
from services.gateway.disconnect import cancel_all, client_left
from services.gateway.http_errors import ErrorReply
from services.gateway.http_metrics import HttpMetrics
from services.gateway.openai_response import DONE, AnswerFormat
from tailrace.errors import TailraceError
from tailrace.types import FinishReason

_log = logging.getLogger(__name__)
_KEEPALIVE = ": waiting\n\n"
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
    """Between the generations and a client: what a slow client has not taken yet is joined into one piece a choice."""

    def __init__(self) -> None:
        self._pieces: dict[int, _Piece] = {}
        self._changed = asyncio.Event()
        self._is_last = False
        self._error: BaseException | None = None

    def put(self, index: int, delta: Delta, reason: FinishReason | None) -> None:
        if index in self._pieces:
            before, _ = self._pieces[index]
            delta = Delta(before.text + delta.text, before.tokens + delta.tokens)
        self._pieces[index] = delta, reason
        self._changed.set()

    def close(self, error: BaseException | None = None) -> None:
        self._is_last, self._error = True, error
        self._changed.set()

    async def take(self, timeout_s: float) -> Batch:
        """Everything that waits; empty after `timeout_s` without anything."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return Batch()
        self._changed.clear()
        pieces, self._pieces = self._pieces, {}
        return Batch(pieces, self._is_last, self._error)


class EventStream(Response):
    """Follows an answer, which it owns, to its end or to the client's."""

    def __init__(
        self,
        answer: Answer,
        answer_format: AnswerFormat,
        metrics: HttpMetrics,
        options: StreamOptions,
        *,
        include_usage: bool,
        request_id: str,
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self._answer = answer
        self._format = answer_format
        self._metrics = metrics
        self._options = options
        self._include_usage = include_usage
        self._request_id = request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outbox = Outbox()
        follower = asyncio.create_task(self._follow(outbox))
        writer = asyncio.create_task(self._write(outbox, scope, receive, send))
        left = asyncio.create_task(client_left(receive))
        try:
            await asyncio.wait((writer, left), return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()
            else:
                self._metrics.disconnects.labels("left").inc()
        finally:
            # Cancelled first, so that nobody iterates what is closed.
            for task in (follower, writer, left):
                task.cancel()
            await self._answer.aclose()
            await cancel_all(follower, writer, left)

    async def _follow(self, outbox: Outbox) -> None:
        try:
            await self._answer.run(outbox.put)
        except TailraceError as error:
            outbox.close(error)
        except Exception as error:
            _log.exception("request %s failed", self._request_id)
            outbox.close(error)
        else:
            outbox.close()

    async def _write(self, outbox: Outbox, scope: Scope, receive: Receive, send: Send) -> None:
        batch = await outbox.take(self._options.opening_wait_s)
        if batch.error is not None and not batch.pieces:
            await ErrorReply.of(batch.error).response()(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        text = self._format.opening(self._answer.num_choices)
        try:
            while not batch.is_last:
                await self._send(send, (text + self._chunks(batch)) or _KEEPALIVE, more=True)
                text = ""
                batch = await outbox.take(self._options.keepalive_s)
            await self._send(send, text + self._chunks(batch) + self._ending(batch.error), more=False)
        except TimeoutError:
            self._metrics.disconnects.labels("slow").inc()
            _log.warning("request %s: its client read nothing for %g s", self._request_id, self._options.slow_client_s)

    def _chunks(self, batch: Batch) -> str:
        return "".join(self._format.chunks(index, *piece) for index, piece in batch.pieces.items())

    def _ending(self, error: BaseException | None) -> str:
        if error is not None:
            return f"data: {ErrorReply.of(error).body.decode()}\n\n"
        return (self._format.usage_chunk(self._answer.usage) if self._include_usage else "") + DONE

    async def _send(self, send: Send, text: str, *, more: bool) -> None:
        async with asyncio.timeout(self._options.slow_client_s):
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

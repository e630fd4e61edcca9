"""What is around every request: its id, the API key, the last resort for errors, counting."""

import logging
import re
import time
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.caller import ApiKeys
from services.gateway.http_errors import ErrorReply
from services.gateway.http_metrics import HttpMetrics
from tailrace.errors import UnauthenticatedError

_log = logging.getLogger(__name__)
_OPEN_PATHS = frozenset({"/health", "/ready", "/version", "/metrics"})
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Edge:
    """ASGI middleware. Puts `request_id` and `arrived_at` (monotonic seconds) into the scope's state."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], metrics: HttpMetrics) -> None:
        self._app = app
        self._keys = ApiKeys(api_keys)
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, send)
        with self._metrics.in_flight.track_inprogress():
            try:
                await self._answer(scope, receive, exchange)
            finally:
                method = scope["method"] if scope["method"] in _METHODS else "other"
                self._metrics.requests.labels(method, exchange.route, str(exchange.status or 499)).inc()

    async def _answer(self, scope: Scope, receive: Receive, exchange: "_Exchange") -> None:
        try:
            if scope["path"] not in _OPEN_PATHS:
                self._keys.check(Headers(scope=scope).get("authorization", ""))
        except UnauthenticatedError as error:
            await ErrorReply.of(error).response()(scope, receive, exchange.send)
            return
        try:
            await self._app(scope, receive, exchange.send)
        except Exception as error:
            _log.exception("request %s failed", exchange.request_id)
            if not exchange.status:
                await ErrorReply.of(error).response()(scope, receive, exchange.send)


class _Exchange:
    """One request and its answer, as far as it has been sent."""

    def __init__(self, scope: Scope, send: Send) -> None:
        given = Headers(scope=scope).get("x-request-id", "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.status = 0
        self._scope = scope
        self._send = send
        scope.setdefault("state", {}).update(request_id=self.request_id, arrived_at=time.monotonic())

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["X-Request-Id"] = self.request_id
        await self._send(message)

    @property
    def route(self) -> str:
        """The route's pattern, not the path: labels of a metric are bounded."""
        return str(getattr(self._scope.get("route"), "path", "none"))

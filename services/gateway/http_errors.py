"""Every error as HTTP: a status, and OpenAI's error object as the body."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil

from fastapi import Request, Response
from starlette.exceptions import HTTPException

from tailrace import errors


class ContextLengthError(errors.InvalidRequestError):
    """Prompt and answer do not fit into the model's context."""


class ModelNotFoundError(errors.NotFoundError):
    """This gateway serves no model of that name."""


class BodyTooLargeError(errors.InvalidRequestError):
    """The body is longer than the server reads."""


class BodyTimeoutError(errors.InvalidRequestError):
    """The client took too long to send the body."""


@dataclass(frozen=True, slots=True)
class _Kind:
    status: int
    type: str
    code: str | None


_INVALID = "invalid_request_error"
_SERVER = "server_error"
_KINDS: dict[type[errors.TailraceError], _Kind] = {
    ContextLengthError: _Kind(400, _INVALID, "context_length_exceeded"),
    ModelNotFoundError: _Kind(404, _INVALID, "model_not_found"),
    BodyTooLargeError: _Kind(413, _INVALID, "body_too_large"),
    BodyTimeoutError: _Kind(408, _INVALID, "body_timeout"),
    errors.InvalidRequestError: _Kind(400, _INVALID, None),
    errors.UnauthenticatedError: _Kind(401, "authentication_error", "invalid_api_key"),
    errors.NotFoundError: _Kind(404, _INVALID, "not_found"),
    errors.OverloadedError: _Kind(503, _SERVER, "overloaded"),
    errors.UnavailableError: _Kind(503, _SERVER, "unavailable"),
    errors.WorkerLostError: _Kind(503, _SERVER, "worker_lost"),
    errors.TransferError: _Kind(503, _SERVER, "transfer_failed"),
    errors.DeadlineExceededError: _Kind(504, "timeout_error", "deadline_exceeded"),
    errors.CancelledByClientError: _Kind(499, "cancelled", "cancelled"),
    errors.TailraceError: _Kind(500, _SERVER, "internal_error"),
}
_INTERNAL_MESSAGE = "The server failed to answer; its log has the reason under this request's X-Request-Id."


@dataclass(frozen=True, slots=True)
class ErrorReply:
    status: int
    message: str
    type: str = _INVALID
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, error: BaseException) -> "ErrorReply":
        """Of anything raised. What is not a TailraceError with a meaning for the caller tells no details."""
        if not isinstance(error, errors.TailraceError):
            return cls.of(errors.InternalError(""))
        kind = next(_KINDS[base] for base in type(error).__mro__ if base in _KINDS)
        message = _INTERNAL_MESSAGE if kind.status == 500 else error.message
        return cls(kind.status, message, kind.type, error.param, kind.code, _headers(kind.status, error.retry_after_s))

    @property
    def body(self) -> bytes:
        content = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": content}, ensure_ascii=False).encode("utf-8", "replace")

    def response(self) -> Response:
        return Response(self.body, self.status, dict(self.headers), "application/json")


def _headers(status: int, retry_after_s: float) -> dict[str, str]:
    if status == 503:
        return {"Retry-After": str(max(1, ceil(retry_after_s)))}
    return {"WWW-Authenticate": "Bearer"} if status == 401 else {}


async def answer_error(_request: Request, error: Exception) -> Response:
    """FastAPI exception handler for TailraceError."""
    return ErrorReply.of(error).response()


async def answer_http_exception(request: Request, error: Exception) -> Response:
    """FastAPI exception handler for what the router raises: no such route (404), no such method (405)."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    code = {404: "route_not_found", 405: "method_not_allowed"}.get(error.status_code)
    return ErrorReply(error.status_code, message, code=code, headers=error.headers or {}).response()

"""Every error that crosses a room: what happened, whether a retry may help, and which field was wrong."""

from enum import IntEnum


class ErrorCode(IntEnum):
    """Numbers are those of `tailrace.v1.ErrorCode` on the wire."""

    INVALID_REQUEST = 1
    UNAUTHENTICATED = 2
    NOT_FOUND = 3
    OVERLOADED = 4
    UNAVAILABLE = 5
    DEADLINE_EXCEEDED = 6
    CANCELLED = 7
    WORKER_LOST = 8
    TRANSFER_FAILED = 9
    LAYOUT_MISMATCH = 10
    INTERNAL = 11


class TailraceError(Exception):
    """Base of all errors with a meaning for the caller.

    `param` names the offending request field or option; `retry_after_s` is 0 where nobody knows.
    """

    code = ErrorCode.INTERNAL
    retryable = False

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequestError(TailraceError):
    """The request can never succeed as it stands; `param` names the field."""

    code = ErrorCode.INVALID_REQUEST


class ConfigError(TailraceError):
    """An option, environment variable or configuration file is wrong; `param` names it."""

    code = ErrorCode.INVALID_REQUEST


class CheckpointError(TailraceError):
    """A model directory or weights file cannot be served: missing, corrupt or of an unsupported kind."""

    code = ErrorCode.INVALID_REQUEST


class UnauthenticatedError(TailraceError):
    """No or wrong API key, ticket or cluster secret."""

    code = ErrorCode.UNAUTHENTICATED


class NotFoundError(TailraceError):
    """No such model, route or request."""

    code = ErrorCode.NOT_FOUND


class OverloadedError(TailraceError):
    """Refused for lack of room; come back after `retry_after_s`."""

    code = ErrorCode.OVERLOADED
    retryable = True


class UnavailableError(TailraceError):
    """Nobody here can serve the request now."""

    code = ErrorCode.UNAVAILABLE
    retryable = True


class DeadlineExceededError(TailraceError):
    """The request's deadline passed."""

    code = ErrorCode.DEADLINE_EXCEEDED


class CancelledByClientError(TailraceError):
    """The client went away or cancelled."""

    code = ErrorCode.CANCELLED


class WorkerLostError(TailraceError):
    """The worker died, hung or was cut off."""

    code = ErrorCode.WORKER_LOST
    retryable = True


class TransferError(TailraceError):
    """KV blocks could not be read from their owner."""

    code = ErrorCode.TRANSFER_FAILED
    retryable = True


class LayoutMismatchError(TailraceError):
    """Two workers disagree on a named field of the KV layout."""

    code = ErrorCode.LAYOUT_MISMATCH


class InternalError(TailraceError):
    """A defect of ours."""

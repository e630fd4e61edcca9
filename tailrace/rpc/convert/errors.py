"""Errors on the wire: code, text, the field that was wrong and when to come back."""

from tailrace import errors
from tailrace.errors import ErrorCode, TailraceError
from tailrace.rpc.gen import error_pb2

_ERRORS: dict[int, type[TailraceError]] = {
    ErrorCode.INVALID_REQUEST: errors.InvalidRequestError,
    ErrorCode.UNAUTHENTICATED: errors.UnauthenticatedError,
    ErrorCode.NOT_FOUND: errors.NotFoundError,
    ErrorCode.OVERLOADED: errors.OverloadedError,
    ErrorCode.UNAVAILABLE: errors.UnavailableError,
    ErrorCode.DEADLINE_EXCEEDED: errors.DeadlineExceededError,
    ErrorCode.CANCELLED: errors.CancelledByClientError,
    ErrorCode.WORKER_LOST: errors.WorkerLostError,
    ErrorCode.TRANSFER_FAILED: errors.TransferError,
    ErrorCode.LAYOUT_MISMATCH: errors.LayoutMismatchError,
    ErrorCode.INTERNAL: errors.InternalError,
}


def error_to_proto(error: TailraceError) -> error_pb2.Error:
    return error_pb2.Error(
        code=error_pb2.ErrorCode.ValueType(int(error.code)),
        retryable=error.retryable,
        retry_after_s=error.retry_after_s,
        message=error.message,
        param=error.param or "",
    )


def error_from_proto(message: error_pb2.Error) -> TailraceError:
    """An unknown code, from a newer peer, is an internal error."""
    kind = _ERRORS.get(int(message.code), errors.InternalError)
    return kind(message.message, param=message.param or None, retry_after_s=message.retry_after_s)

"""What a caller says of itself, whatever the protocol: its key, its name for the request, its trace."""

import hmac
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from tailrace.errors import InvalidRequestError, UnauthenticatedError

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_MAX_TRACESTATE = 512
SESSION_HEADER = "X-Session-Id"
MAX_SESSION_ID = 256


class ApiKeys:
    """Those that open the API; none: it is open to everyone."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [key.encode() for key in keys]

    def check(self, authorization: str) -> None:
        """Raises UnauthenticatedError unless it is `Bearer <one of the keys>`."""
        scheme, _, key = authorization.partition(" ")
        # All keys are compared, so that the time taken does not tell which one was nearly right.
        matches = [hmac.compare_digest(key.strip().encode("utf-8", "replace"), known) for known in self._keys]
        if self._keys and not (scheme.lower() == "bearer" and any(matches)):
            raise UnauthenticatedError("a valid API key is needed: Authorization: Bearer <key>")


def request_id_of(given: str) -> str:
    """A new one when none is given. Raises InvalidRequestError for one that would spoil a log."""
    if given and not _REQUEST_ID.fullmatch(given):
        message = "request_id: 1 to 128 letters, digits, dots, dashes and underscores are allowed"
        raise InvalidRequestError(message, param="request_id")
    return given or f"gen-{uuid.uuid4().hex}"


def session_id_of(given: str, name: str) -> str:
    """Raises InvalidRequestError, naming the field, for one that is too long to remember."""
    if len(given) > MAX_SESSION_ID:
        raise InvalidRequestError(f"{name}: {len(given)} characters; at most {MAX_SESSION_ID}", param=name)
    return given


@dataclass(frozen=True, slots=True)
class Trace:
    """W3C Trace Context; empty when the caller has sent none that is well-formed, as the standard asks."""

    parent: str = ""
    state: str = ""

    @classmethod
    def of(cls, traceparent: str, tracestate: str) -> "Trace":
        return cls(traceparent, tracestate[:_MAX_TRACESTATE]) if _TRACEPARENT.fullmatch(traceparent) else cls()

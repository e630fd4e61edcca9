"""Who may talk to whom inside the cluster: a bearer proof of the cluster secret, and tickets for single requests.

Both are HMAC-SHA256 under the cluster secret. Nothing here depends on a clock: a ticket names an epoch of its owner,
and dies with it.
"""

import hashlib
import hmac
import struct

AUTH_HEADER = "x-tailrace-auth"


def control_token(secret: bytes) -> str:
    """Sent by every member with every call. It stays secret only on a network that is trusted, or encrypted below."""
    return hmac.new(secret, b"tailrace control v1", hashlib.sha256).hexdigest()


def is_control_token(token: str, presented: str) -> bool:
    return hmac.compare_digest(token.encode(), presented.encode())


def sign_ticket(secret: bytes, request_id: str, attempt: int, owner_id: str, owner_epoch: int) -> bytes:
    """Lets its bearer borrow the blocks of one attempt of one request from one life of one owner."""
    message = b"".join(_framed(part.encode()) for part in ("tailrace ticket v1", request_id, owner_id))
    return hmac.new(secret, message + struct.pack("<IQ", attempt, owner_epoch), hashlib.sha256).digest()


def is_ticket(ticket: bytes, secret: bytes, request_id: str, attempt: int, owner_id: str, owner_epoch: int) -> bool:
    return hmac.compare_digest(sign_ticket(secret, request_id, attempt, owner_id, owner_epoch), ticket)


def _framed(part: bytes) -> bytes:
    return struct.pack("<I", len(part)) + part

"""Where the last request of each session went: a hint, for when prices tie or an index has not heard yet. No clock."""

from collections import OrderedDict
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from tailrace.policy.routing import Preferred, Route

MAX_SESSIONS = 1 << 16
"""Remembered, those used last."""
EXPECT_S = 5.0
"""For which a worker is taken to hold what it was sent, whatever the index says: news of it may be under way."""
_KEY_BYTES = 16


def session_key(session_id: str, cache_salt: str) -> bytes:
    """Names a session of one tenant; another tenant's of the same id has another name. Empty for no session."""
    if not session_id:
        return b""
    digest = blake2b(digest_size=_KEY_BYTES)
    for part in (session_id.encode(), cache_salt.encode()):
        digest.update(len(part).to_bytes(4, "little"))
        digest.update(part)
    return digest.digest()


@dataclass(frozen=True, slots=True)
class _Last:
    """The last request of a session. Its prompt's blocks are named by the last of them: a hash covers all before it."""

    preferred: Preferred
    num_blocks: int
    last_hash: bytes
    sent_s: float


class SessionHints:
    """By `session_key`."""

    def __init__(self) -> None:
        self._last: OrderedDict[bytes, _Last] = OrderedDict()

    def __len__(self) -> int:
        return len(self._last)

    def sent(self, session: bytes, route: Route, now_s: float) -> None:
        hashes = route.hashes
        preferred = Preferred(route.prefill_id or "", route.decode_id)
        self._last[session] = _Last(preferred, len(hashes), hashes[-1] if hashes else b"", now_s)
        self._last.move_to_end(session)
        if len(self._last) > MAX_SESSIONS:
            self._last.popitem(last=False)

    def preferred(self, session: bytes) -> Preferred | None:
        last = self._last.get(session)
        return last.preferred if last is not None else None

    def expect(self, session: bytes, hashes: Sequence[bytes], hits: MutableMapping[str, int], now_s: float) -> None:
        """Adds to `hits` what the worker that computed the session's last prompt must hold by now."""
        last = self._last.get(session)
        if last is None or not 0 < last.num_blocks <= len(hashes) or now_s - last.sent_s > EXPECT_S:
            return
        worker_id = last.preferred.prefill_id or last.preferred.decode_id
        if hashes[last.num_blocks - 1] == last.last_hash and hits.get(worker_id, 0) < last.num_blocks:
            hits[worker_id] = last.num_blocks

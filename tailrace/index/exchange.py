"""Gateways tell one another over Redis what they have sent to workers, so that a burst over several does not herd.

No request waits for it: what is told is what was decided, and what was heard is in memory. Each message is a gateway's
whole state with a time to live that counts from its arrival, so a lost one is made good by the next, and a gateway that
dies takes along what it told. While Redis is away, each gateway counts its own, as without Redis. Messages are signed
with the cluster's secret, like registrations: whoever else can write to Redis cannot make workers look busy.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tailrace.index.backoff import Backoff, keep_trying, until_one_fails
from tailrace.index.keys import KeySpace
from tailrace.index.redis_client import BLOCK_SHARE, RedisClient
from tailrace.index.registry import check_version
from tailrace.index.streams import read_messages, read_streams, stream_end
from tailrace.index.trouble import RedisTroubleError
from tailrace.policy.estimates import MAX_PREFILL_S
from tailrace.policy.other_routers import MARK_BYTES, MAX_GIVEN, MAX_MARKS, Given, InFlight, RouterNews

log = logging.getLogger(__name__)

COALESCE_S = 0.02
"""After a message, news waits so long for company. What comes after a pause is told at once."""
AGAIN_S = 0.1
"""What is in flight is told again after so long: it grows less."""
TTL_S = 1.0
"""How long others believe a message."""
MAX_READ = 64
MAX_MESSAGES = 256
"""In the stream, about. Who reads more slowly misses some, and gets the next."""
MAX_WORKERS = 1024
"""In one message; those with the longest queues."""
MAX_BYTES = 1 << 18
"""Of one message."""
MAX_TTL_S = 10.0
MAX_COUNT = 1 << 40
_ROUTER, _TTL, _WORKERS, _GIVEN, _MARKS = b"router", b"ttl_ms", b"workers", b"given", b"marks"
_SIGNATURE = b"signature"


@dataclass(frozen=True, slots=True)
class Message:
    """What one gateway tells."""

    router_id: str
    ttl_s: float
    news: RouterNews

    def fields(self, secret: bytes) -> list[bytes]:
        """Names and values, one after the other."""
        there = sorted(self.news.in_flight.items(), key=lambda item: -item[1].prefill_s)[:MAX_WORKERS]
        workers = {
            name: [_believable_s(told.prefill_s), told.tokens, told.sequences, len(told.marks)] for name, told in there
        }
        marks = b"".join(mark for _, told in there for mark in told.marks)
        given = [[worker_id, _believable_s(seconds)] for worker_id, seconds in self.news.given]
        head = {_ROUTER: self.router_id.encode(), _TTL: b"%d" % (self.ttl_s * 1000)}
        said = {**head, _WORKERS: json.dumps(workers).encode(), _GIVEN: json.dumps(given).encode(), _MARKS: marks}
        signed = {**said, _SIGNATURE: _signature(list(said.values()), secret)}
        return [piece for pair in signed.items() for piece in pair]

    @classmethod
    def read(cls, fields: Mapping[object, object], secret: bytes) -> "Message":
        """Raises ValueError for what no gateway of this cluster wrote."""
        values = [fields.get(name) for name in (_ROUTER, _TTL, _WORKERS, _GIVEN, _MARKS, _SIGNATURE)]
        texts = [value for value in values if isinstance(value, bytes)]
        if len(texts) < len(values) or sum(map(len, texts)) > MAX_BYTES:
            raise ValueError(f"a message with the fields {', '.join(map(repr, list(fields)[:8]))}")
        router_id, ttl_ms, workers, given, marks, signature = texts
        if not hmac.compare_digest(signature, _signature(texts[:-1], secret)):
            raise ValueError("a message signed with another secret, or changed")
        try:
            ttl_s = _number(int(ttl_ms) / 1000, MAX_TTL_S)
            return cls(router_id.decode(), ttl_s, RouterNews(_in_flight(json.loads(workers), marks), _given(given)))
        except (TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"a message that is none: {error}") from None


def _signature(values: Sequence[bytes], secret: bytes) -> bytes:
    digest = hmac.new(secret, b"tailrace reservations v1", hashlib.sha256)
    for value in values:
        digest.update(len(value).to_bytes(8, "little") + value)
    return digest.digest()


def _in_flight(workers: Mapping[str, list[float]], marks: bytes) -> dict[str, InFlight]:
    if len(workers) > MAX_WORKERS or len(marks) > MAX_MARKS * MARK_BYTES:
        raise ValueError(f"{len(workers)} workers and {len(marks)} bytes of marks")
    found: dict[str, InFlight] = {}
    start = 0
    for name, (prefill_s, tokens, sequences, num_marks) in workers.items():
        end = start + int(_number(num_marks, MAX_MARKS)) * MARK_BYTES
        there = frozenset(marks[at : at + MARK_BYTES] for at in range(start, end, MARK_BYTES))
        counts = int(_number(tokens, MAX_COUNT)), int(_number(sequences, MAX_COUNT))
        found[name] = InFlight(_number(prefill_s, MAX_PREFILL_S), *counts, there)
        start = end
    return found


def _given(text: bytes) -> tuple[Given, ...]:
    told = json.loads(text)
    if len(told) > MAX_GIVEN:
        raise ValueError(f"{len(told)} prefills")
    return tuple(Given(str(worker_id), _number(seconds, MAX_PREFILL_S)) for worker_id, seconds in told)


def _believable_s(seconds: float) -> float:
    """As others take it: a message with one number beyond their bounds is none to them."""
    return 0.0 if math.isnan(seconds) else round(min(max(seconds, 0.0), MAX_PREFILL_S), 4)


def _number(value: float, most: float) -> float:
    """What is impossible must not win or lose every comparison for a worker."""
    if not (math.isfinite(value) and 0 <= value <= most):
        raise ValueError(f"the number {value}")
    return value


class Exchange:
    """Tells and hears for as long as `run` runs. Event loop only."""

    def __init__(
        self,
        client: RedisClient,
        keys: KeySpace,
        *,
        router_id: str,
        secret: bytes,
        news: Callable[[], RouterNews],
        hear: Callable[[str, RouterNews, float], None],
    ) -> None:
        """`router_id`: of this process alone. `hear` is given a router's id, its news, and for how many seconds."""
        self._client, self._keys, self._router_id, self._secret = client, keys, router_id, secret
        self._news, self._hear = news, hear
        self._changed = asyncio.Event()
        self._is_busy = False
        """Others believe that something is in flight."""
        self.is_following = False
        self.trouble = ""
        """Empty: all is well, or not tried yet."""
        self.num_garbage = 0
        """Messages that no gateway wrote."""

    def changed(self) -> None:
        """There is news. Never blocks, never raises."""
        self._changed.set()

    async def run(self) -> None:
        """Until it is cancelled."""
        try:
            await keep_trying(self._client, self._session, self._note, "sharing what is in flight")
        finally:
            await self._client.close()

    async def _session(self, backoff: Backoff) -> None:
        await self._client.open()
        await check_version(self._client, self._keys)
        cursor = await stream_end(self._client, self._keys.reservations)
        self.trouble, self.is_following = "", True
        backoff.reset()
        # What was sent out while Redis was away is no news any more: told at once, it would look like a burst.
        self._news()
        await until_one_fails([self._keep_telling(), self._listen(cursor)])

    def _note(self, error: RedisTroubleError) -> None:
        if self.trouble != error.message:
            log.info("%s; what other gateways have in flight is not counted meanwhile", error.message)
        self.trouble, self.is_following = error.message, False

    async def _keep_telling(self) -> None:
        while True:
            await self._wait()
            self._changed.clear()
            news = self._news()
            if news or self._is_busy:
                await self._tell(news)
                self._is_busy = bool(news.in_flight)
                await asyncio.sleep(COALESCE_S)

    async def _wait(self) -> None:
        """For news; while something is in flight, no longer than until it must be told again."""
        try:
            async with asyncio.timeout(AGAIN_S if self._is_busy else None):
                await self._changed.wait()
        except TimeoutError:
            pass

    async def _tell(self, news: RouterNews) -> None:
        fields = Message(self._router_id, TTL_S, news).fields(self._secret)
        await self._client.one("XADD", self._keys.reservations, "MAXLEN", "~", MAX_MESSAGES, "*", *fields)

    async def _listen(self, cursor: bytes) -> None:
        stream, block_ms = self._keys.reservations, int(self._client.timeout_s * BLOCK_SHARE * 1000)
        while True:
            answer = await self._client.one("XREAD", "COUNT", MAX_READ, "BLOCK", block_ms, "STREAMS", stream, cursor)
            for _, messages in read_streams(answer):
                for message_id, fields in read_messages(messages):
                    cursor = message_id
                    self._take(fields)
            await asyncio.sleep(0)

    def _take(self, fields: Mapping[object, object]) -> None:
        try:
            message = Message.read(fields, self._secret)
        except ValueError as error:
            self.num_garbage += 1
            if self.num_garbage == 1:
                log.warning("Redis at %s holds what no gateway wrote: %s", self._client.url.address, error)
            return
        if message.router_id != self._router_id:
            self._hear(message.router_id, message.news, message.ttl_s)

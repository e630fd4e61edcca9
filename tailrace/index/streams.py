"""Answers of Redis about streams, in one form."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tailrace.index.redis_client import RedisClient


async def stream_end(client: RedisClient, stream: bytes) -> bytes:
    """Id of the newest message; b"0" where there is none. Raises RedisTroubleError."""
    newest = list(read_messages(await client.one("XREVRANGE", stream, "+", "-", "COUNT", 1)))
    return newest[0][0] if newest else b"0"


def read_streams(answer: Any) -> Iterable[tuple[bytes, Any]]:
    """Of XREAD: the library tells it in lists or in a dictionary."""
    return answer.items() if isinstance(answer, dict) else [(name, messages) for name, messages in answer or ()]


def read_messages(messages: Any) -> Iterator[tuple[bytes, Mapping[object, object]]]:
    """(id, fields); what is deleted has none."""
    for entry in messages or ():
        message_id, fields = entry
        yield message_id, fields if isinstance(fields, Mapping) else {}


def id_of(message_id: bytes) -> tuple[int, int]:
    """A message's id in the order of the stream."""
    first, _, second = message_id.partition(b"-")
    return int(first), int(second or 0)

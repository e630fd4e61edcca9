"""Pieces written to the connection itself, on uvicorn over both loops, and the way without it."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import httpx
import pytest
import uvloop

from services.gateway import direct, sse
from services.gateway.direct import DirectBody, direct_body
from services.gateway.generate import HttpOptions
from services.gateway.sse import StreamOptions
from tests.helpers.gateway_app import MODEL, client_of, make_app, saying, served

COMPLETIONS = "/v1/completions"
TEXT = 'the cat sat on the mat 🎈日本 "\\\n'
BODY: dict[str, Any] = {
    "model": MODEL,
    "prompt": "a",
    "stream": True,
    "n": 2,
    "stream_options": {"include_usage": True},
}
LOOPS = pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])


@contextmanager
def counted() -> Iterator[list[bytes]]:
    """What was written directly."""
    written: list[bytes] = []
    write = DirectBody.write

    def spy(self: DirectBody, data: bytes) -> bool:
        was_written = write(self, data)
        if was_written:
            written.append(data)
        return was_written

    with mock.patch.object(DirectBody, "write", spy):
        yield written


def texts(payload: str) -> list[str]:
    """Of both choices."""
    found = ["", ""]
    *events, done, rest = payload.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    for event in events:
        for choice in json.loads(event.removeprefix("data: "))["choices"]:
            found[choice["index"]] += choice["text"]
    return found


async def answers(num_requests: int) -> list[httpx.Response]:
    """One after the other over one connection that is kept alive."""
    app = make_app(saying(TEXT, delay_s=0.001))
    async with served(app) as url, httpx.AsyncClient(base_url=url) as client:
        return [await client.post(COMPLETIONS, json=BODY) for _ in range(num_requests)]


@LOOPS
def test_nearly_every_piece_is_written_directly_and_the_connection_lives_on(loop: Any) -> None:
    with counted() as written, asyncio.Runner(loop_factory=loop) as runner:
        responses = runner.run(answers(3))
    for response in responses:
        assert texts(response.text) == [TEXT, TEXT]
    num_events = sum(response.text.count("\n\n") for response in responses)
    assert len(written) > num_events // 2


async def raw_answer(request: bytes, **script: Any) -> bytes:
    """All that a server says until it closes the connection."""
    async with served(make_app(saying(TEXT, delay_s=0.001, **script))) as url:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        content = json.dumps(BODY).encode()
        writer.write(request % len(content) + content)
        async with asyncio.timeout(5):
            data = await reader.read()
        writer.close()
        return data


@LOOPS
@pytest.mark.parametrize(
    "head",
    [b"POST /v1/completions HTTP/1.0\r\n", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"],
    ids=["HTTP/1.0", "close"],
)
def test_a_client_without_keep_alive_gets_the_same_bytes_as_through_send(loop: Any, head: bytes) -> None:
    request = head + b"Content-Length: %d\r\n\r\n"
    with counted() as written, asyncio.Runner(loop_factory=loop) as runner:
        directly = runner.run(raw_answer(request))
        assert written
        with mock.patch.object(sse, "direct_body", return_value=None):
            count = len(written)
            through_send = runner.run(raw_answer(request))
            assert len(written) == count
    assert dechunked_text(directly) == dechunked_text(through_send) == [TEXT, TEXT]
    for data in (directly, through_send):
        assert b"connection: close" in data.partition(b"\r\n\r\n")[0].lower()


def dechunked_text(data: bytes) -> list[str]:
    _, _, rest = data.partition(b"\r\n\r\n")
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return texts(body.decode())


async def test_under_another_server_the_answer_goes_through_send() -> None:
    with counted() as written:
        async with client_of(make_app(saying(TEXT))) as client:
            response = await client.post(COMPLETIONS, json=BODY)
    assert texts(response.text) == [TEXT, TEXT]
    assert written == []


async def test_silence_is_counted_from_the_last_direct_write() -> None:
    options = HttpOptions(stream=StreamOptions(opening_wait_s=0.01, keepalive_s=0.35))
    async with (
        served(make_app(saying("abcdefghij", delay_s=0.1), options)) as url,
        httpx.AsyncClient(base_url=url) as client,
    ):
        response = await client.post(COMPLETIONS, json=BODY | {"n": 1})
    # The writer's wait ends several times, but there was no silence of that length.
    assert response.text.count(": waiting") <= 1


class _Flow:
    write_paused = False


class _Transport:
    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.closing = False

    def is_closing(self) -> bool:
        return self.closing

    def get_extra_info(self, name: str) -> None:
        return None

    def write(self, data: bytes) -> None:
        self.written.append(data)


def test_nothing_is_written_to_a_slow_client_or_a_closed_connection() -> None:
    class Cycle:
        flow, transport = _Flow(), _Transport()

    body = DirectBody(Cycle())  # type: ignore[arg-type]
    assert body.write(b"x" * 17)
    Cycle.flow.write_paused = True
    assert not body.write(b"y")
    Cycle.flow.write_paused, Cycle.transport.closing = False, True
    assert not body.write(b"z")
    assert Cycle.transport.written == [b"11\r\n" + b"x" * 17 + b"\r\n"]


def test_what_is_not_uvicorn_s_own_object_is_left_alone() -> None:
    class Cycle:
        chunked_encoding, response_started = True, True

        async def receive(self) -> Any: ...

    assert direct_body(Cycle().receive) is None

    async def receive() -> Any: ...

    assert direct_body(receive) is None
    with mock.patch.object(direct, "uvicorn_http", None):
        assert direct_body(receive) is None

"""Server-sent events: their shape, errors on the way, clients that leave or do not read. On a real server."""

import asyncio
import json
import random
from contextlib import suppress
from typing import Any

import httpx
import pytest

from services.gateway.choice import Delta
from services.gateway.generate import HttpOptions
from services.gateway.generation import GenerationRequest, Usage
from services.gateway.sse import Outbox, StreamOptions
from tailrace.errors import WorkerLostError
from tailrace.types import FinishReason
from tests.helpers.fake_dispatcher import FakeDispatcher, Script
from tests.helpers.gateway_app import EOS, MODEL, TOKENIZER, client_of, ids, make_app, post, saying, served
from tests.helpers.waiting import until

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HI: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    """Every event of a stream that ended well, but the last."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    return chunks


async def stream(dispatcher: FakeDispatcher, path: str, **fields: Any) -> list[dict[str, Any]]:
    chunks = chunks_of(await post(dispatcher, path, {"stream": True, **fields}))
    assert dispatcher.all_closed()
    return chunks


async def test_chat_chunks() -> None:
    dispatcher = saying("the 日本")
    role, *texts, last = await stream(dispatcher, CHAT, messages=HI["messages"])
    assert role["object"] == "chat.completion.chunk"
    assert role["id"] == dispatcher.requests[0].request_id
    opening = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    assert role["choices"] == [opening]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in texts) == "the 日本"
    assert last["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    assert all("usage" not in chunk for chunk in (role, *texts, last))


async def test_completion_chunks_of_a_batch_with_echo_and_usage() -> None:
    def script(request: GenerationRequest) -> Script:
        return Script([ids("xy"), [*ids("z"), EOS]], usage=Usage(0, 0, cached_tokens=1))

    options = {"include_usage": True}
    *chunks, last = await stream(
        FakeDispatcher(script), COMPLETIONS, prompt=["a", "b"], n=2, echo=True, stream_options=options
    )
    texts = ["", "", "", ""]
    reasons: dict[int, str] = {}
    for chunk in chunks:
        assert chunk["usage"] is None
        (choice,) = chunk["choices"]
        assert choice["index"] not in reasons
        texts[choice["index"]] += choice["text"]
        if choice["finish_reason"]:
            reasons[choice["index"]] = choice["finish_reason"]
    assert texts == ["axy", "az", "bxy", "bz"]
    assert reasons == dict.fromkeys(range(4), "stop")
    assert last["choices"] == []
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (2, 8)
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


@pytest.mark.parametrize("text", ["🎈日本é" * 3, "a\u2028b\u0085c\r\nd", '"\\\n\x00', "data: [DONE]\n\n"])
async def test_any_text_survives_the_stream(text: str) -> None:
    chunks = await stream(saying(text), CHAT, messages=HI["messages"])
    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(deltas) == text
    assert not any("\ufffd" in delta for delta in deltas)
    raw = await post(saying(text), CHAT, HI)
    assert len(raw.text.splitlines()) == len(raw.text.split("\n")) - 1  # no other ends of lines than ours


@pytest.mark.parametrize("tokens_per_event", [1, 2, 100])
async def test_a_stop_string_is_never_shown(tokens_per_event: int) -> None:
    dispatcher = saying("one STOP two", tokens_per_event=tokens_per_event)
    chunks = await stream(dispatcher, CHAT, messages=HI["messages"], stop="STOP")
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "one "
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert dispatcher.generations[0].finished == [0]


async def test_logprobs_of_chunks_are_those_of_the_whole() -> None:
    fields = {"messages": HI["messages"], "logprobs": True, "top_logprobs": 1, "stop": "zzz"}
    whole = (await post(saying("the zz 🎈"), CHAT, fields)).json()["choices"][0]["logprobs"]["content"]
    chunks = await stream(saying("the zz 🎈"), CHAT, **fields)
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert [entry for part in parts for entry in part["content"]] == whole


async def test_an_error_before_the_first_token_has_a_status() -> None:
    response = await post(saying("abc", fail_at=0, error=WorkerLostError("gone")), CHAT, HI)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "worker_lost")
    assert "retry-after" in response.headers


@pytest.mark.parametrize(
    ("error", "code"), [(WorkerLostError("gone"), "worker_lost"), (KeyError("x"), "internal_error")]
)
async def test_an_error_after_it_is_an_event_and_the_end(error: Exception, code: str) -> None:
    options = HttpOptions(stream=StreamOptions(opening_wait_s=0))
    dispatcher = saying("abc", fail_at=2, error=error, delay_s=0.01)
    response = await post(dispatcher, CHAT, HI, options=options)
    assert response.status_code == 200
    *_, last, end = response.text.split("\n\n")
    assert end == ""
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == code
    assert "[DONE]" not in response.text
    assert dispatcher.all_closed()


async def test_a_generation_that_forgets_a_choice_is_an_error() -> None:
    class Forgetful(FakeDispatcher):
        async def submit(self, request: GenerationRequest) -> Any:
            generation = await super().submit(request)
            generation.finished.append(0)  # as if it had been told to
            return generation

    response = await post(Forgetful(Script([ids("abc")])), CHAT, HI)
    assert response.json()["error"]["code"] == "internal_error"


async def test_silence_is_filled_with_comments() -> None:
    options = HttpOptions(stream=StreamOptions(opening_wait_s=0.01, keepalive_s=0.01))
    response = await post(saying("a", delay_s=0.1), CHAT, HI, options=options)
    role, comment, *_ = response.text.split("\n\n")
    assert '"role"' in role
    assert comment == ": waiting"
    assert response.text.endswith("data: [DONE]\n\n")


async def test_headers() -> None:
    response = await post(saying("a"), CHAT, HI)
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-length" not in response.headers
    assert response.headers["x-request-id"]


async def test_the_outbox_joins_what_waits() -> None:
    outbox = Outbox()
    outbox.put(1, Delta("a"), None)
    outbox.put(0, Delta("x"), None)
    outbox.put(1, Delta("b"), FinishReason.STOP)
    batch = await outbox.take(1)
    assert batch.pieces == {1: (Delta("ab"), FinishReason.STOP), 0: (Delta("x"), None)}
    assert not batch.is_last
    assert not (await outbox.take(0.001)).pieces
    outbox.close()
    assert (await outbox.take(1)).is_last


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("hang_at", [0, 2])
async def test_a_client_that_leaves_gives_everything_back(streaming: bool, hang_at: int) -> None:
    dispatcher = saying("abcdef", hang_at=hang_at)
    async with served(make_app(dispatcher)) as url, httpx.AsyncClient(base_url=url) as client:
        body = {"model": MODEL, "prompt": ["a", "b"], "stream": streaming}
        request = asyncio.create_task(client.post(COMPLETIONS, json=body))
        await until(lambda: [generation.num_events for generation in dispatcher.generations] == [hang_at] * 2)
        request.cancel()
        async with asyncio.timeout(10):
            await asyncio.gather(*(generation.closed.wait() for generation in dispatcher.generations))
        metrics = (await client.get("/metrics")).text
    assert 'tailrace_http_disconnects_total{why="left"} 1.0' in metrics


async def test_random_disconnects_leave_nothing_behind() -> None:
    dispatcher = saying("a long answer " * 3, delay_s=0.001)
    luck = random.Random(7)
    async with served(make_app(dispatcher)) as url, httpx.AsyncClient(base_url=url) as client:

        async def visits() -> None:
            for _ in range(15):
                with suppress(TimeoutError):
                    async with asyncio.timeout(luck.random() * 0.1):
                        await client.post(CHAT, json=HI | {"stream": luck.random() < 0.7})

        await asyncio.gather(*(visits() for _ in range(4)))
        await until(dispatcher.all_closed)
        assert (await client.post(CHAT, json=HI)).status_code == 200
    assert 20 < len(dispatcher.generations) <= 61


async def test_a_client_that_leaves_while_the_request_is_submitted_is_noticed() -> None:
    cancelled = asyncio.Event()

    class Slow(FakeDispatcher):
        async def submit(self, request: GenerationRequest) -> Any:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

    async with served(make_app(Slow(Script([[]])))) as url, httpx.AsyncClient(base_url=url) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post(CHAT, json=HI, timeout=0.1)
        async with asyncio.timeout(10):
            await cancelled.wait()


async def open_stream(url: str, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
    content = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    return reader, writer


def dechunked(response: bytes) -> bytes:
    """The body of a whole HTTP/1.1 response in chunks."""
    head, _, rest = response.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head.lower()
    body = b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        assert rest[length : length + 2] == b"\r\n"
        body, rest = body + rest[:length], rest[length + 2 :]
        if not length:
            assert rest == b""
            return body


def endless(num_events: int) -> FakeDispatcher:
    """Far more text than sockets hold."""
    word = ids(" the cat sat on the mat")
    return FakeDispatcher(Script([word * num_events], tokens_per_event=len(word) * 200))


async def test_a_slow_client_slows_nobody_and_gets_everything() -> None:
    dispatcher = endless(40_000)
    text = " the cat sat on the mat" * 40_000
    async with served(make_app(dispatcher), send_buffer=16384) as url:
        reader, writer = await open_stream(url, {"model": MODEL, "prompt": "a", "stream": True})
        await until(lambda: len(dispatcher.generations) == 1)
        # Nothing is read, yet the generation runs to its end.
        await until(lambda: dispatcher.generations[0].num_events == 202)
        data = b""
        while not data.endswith(b"0\r\n\r\n"):
            data += await reader.read(1 << 20)
        writer.close()
    events = [line for line in dechunked(data).decode().split("\n") if line.startswith("data: {")]
    parts = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events]
    assert "".join(parts) == text
    assert len(parts) < 150  # joined while nobody read


async def test_a_client_that_never_reads_is_cut() -> None:
    dispatcher = endless(40_000)
    options = HttpOptions(stream=StreamOptions(slow_client_s=0.2))
    async with served(make_app(dispatcher, options), send_buffer=16384) as url:
        _, writer = await open_stream(url, {"model": MODEL, "prompt": "a", "stream": True})
        await until(lambda: len(dispatcher.generations) == 1)
        async with asyncio.timeout(8):
            await dispatcher.generations[0].closed.wait()
        writer.transport.abort()
        async with httpx.AsyncClient(base_url=url) as client:
            assert 'tailrace_http_disconnects_total{why="slow"} 1.0' in (await client.get("/metrics")).text


async def test_a_client_that_stalls_in_its_body_is_let_go() -> None:
    async with served(make_app(saying("a"), HttpOptions(body_timeout_s=0.1))) as url:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
        assert b" 408 " in await reader.readline()
        writer.close()


async def test_a_body_over_the_limit_on_a_real_connection() -> None:
    app = make_app(saying("a"), HttpOptions(max_body_bytes=1000))
    async with served(app) as url, httpx.AsyncClient(base_url=url) as client:
        for content in (b"x" * 3_000_000, iter_chunks()):
            assert (await client.post(CHAT, content=content)).status_code == 413
        assert (await client.post(CHAT, json=HI)).status_code == 200


async def iter_chunks() -> Any:
    for _ in range(300):
        yield b"x" * 10_000


async def test_prompt_ids_of_a_stream_are_those_of_the_whole() -> None:
    dispatcher = saying("a")
    async with client_of(make_app(dispatcher)) as client:
        await client.post(CHAT, json=HI)
        await client.post(CHAT, json=HI | {"stream": False})
    assert (
        dispatcher.requests[0].prompt_tokens
        == dispatcher.requests[1].prompt_tokens
        == TOKENIZER.encode_chat(HI["messages"])
    )

"""Both clients against a real gRPC server on loopback, over a fake dispatcher."""

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

import grpc.aio
import pytest

from services.gateway.inference import InferenceOptions
from tailrace.client import (
    AsyncClient,
    ChatMessage,
    Client,
    Completion,
    Event,
    Finished,
    FinishReason,
    Started,
    TokenChunk,
    TokenLogprob,
)
from tailrace.errors import (
    CancelledByClientError,
    DeadlineExceededError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    TailraceError,
    UnauthenticatedError,
    UnavailableError,
    WorkerLostError,
)
from tailrace.rpc.gen.generation_pb2 import GenerateResponse
from tailrace.rpc.gen.generation_pb2_grpc import InferenceServiceServicer, add_InferenceServiceServicer_to_server
from tests.helpers.fake_dispatcher import FakeDispatcher, Script
from tests.helpers.gateway_app import EOS, ids, saying
from tests.helpers.grpc_gateway import grpc_gateway

T = TypeVar("T")


async def in_thread(address: str, use: Callable[[Client], T], **options: Any) -> T:
    def work() -> T:
        with Client(address, **options) as client:
            return use(client)

    return await asyncio.to_thread(work)


async def ask(address: str, kind: str, prompt: Any = "x", settings: Any = None, **options: Any) -> Completion:
    """A completion through a client of the given kind, made with `settings`."""
    if kind == "blocking":
        return await in_thread(address, lambda client: client.complete(prompt, **options), **(settings or {}))
    async with AsyncClient(address, **(settings or {})) as client:
        return await client.complete(prompt, **options)


async def answer_of(dispatcher: FakeDispatcher, kind: str, prompt: Any, **options: Any) -> Completion:
    async with grpc_gateway(dispatcher) as address:
        return await ask(address, kind, prompt, **options)


async def error_from(dispatcher: FakeDispatcher, kind: str, **settings: Any) -> TailraceError:
    async with grpc_gateway(dispatcher, InferenceOptions(api_keys=("key",))) as address:
        with pytest.raises(TailraceError) as caught:
            await ask(address, kind, settings={"api_key": "key", **settings})
    return caught.value


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 (the server has nothing to wait for)
            await asyncio.sleep(0.005)


both = pytest.mark.parametrize("kind", ["blocking", "asynchronous"])


# -- answers ----------------------------------------------------------------------------------------------------------


@both
async def test_a_completion_is_the_whole_answer(kind: str):
    completion = await answer_of(saying("a cat 🎉", delay_s=0.001), kind, "the cat", seed=5, request_id="mine")
    assert (completion.text, completion.finish_reason) == ("a cat 🎉", FinishReason.STOP)
    assert completion.token_ids == (*ids("a cat 🎉"), EOS)
    assert (completion.request_id, completion.seed) == ("mine", 5)
    assert completion.usage.prompt_tokens == len(ids("the cat"))
    assert completion.usage.completion_tokens == len(completion.token_ids)


@both
async def test_choices_and_log_probabilities(kind: str):
    script = Script([ids("one"), ids("two cat")], reason=FinishReason.LENGTH)
    completion = await answer_of(FakeDispatcher(script), kind, [5, 6], n=2, logprobs=1)
    assert [choice.text for choice in completion.choices] == ["one", "two cat"]
    assert [choice.finish_reason for choice in completion.choices] == [FinishReason.LENGTH] * 2
    for choice in completion.choices:
        assert choice.logprobs == tuple(TokenLogprob(-0.5, ((i, -0.5),)) for i in choice.token_ids)


@both
async def test_messages_token_ids_and_text_reach_the_gateway(kind: str):
    dispatcher = saying("a")
    async with grpc_gateway(dispatcher) as address:
        for prompt in ("cat", ids("cat"), [ChatMessage("user", "cat")], [{"role": "user", "content": "cat"}]):
            await ask(address, kind, prompt)
    text, tokens, message, mapping = (request.prompt_tokens for request in dispatcher.requests)
    assert text == tokens == ids("cat")
    assert message == mapping
    assert len(message) > len(text)


async def test_events_are_frozen_values_in_order():
    async with grpc_gateway(saying("the cat sat", delay_s=0.001)) as address, AsyncClient(address) as client:
        events: list[Event] = [event async for event in client.generate("x", max_tokens=16, temperature=0)]
    assert isinstance(events[0], Started)
    assert all(isinstance(event, TokenChunk) for event in events[1:-1])
    assert isinstance(events[-1], Finished)
    assert "".join(event.text for event in events if isinstance(event, TokenChunk)) == "the cat sat"
    with pytest.raises(AttributeError):
        events[0].seed = 1  # type: ignore[misc,union-attr]


async def test_threads_share_one_client():
    dispatcher = saying("a cat", delay_s=0.001)
    async with grpc_gateway(dispatcher) as address:
        with Client(address) as client:
            answers = await asyncio.gather(*(asyncio.to_thread(client.complete, "x") for _ in range(8)))
    assert [answer.text for answer in answers] == ["a cat"] * 8


# -- errors -----------------------------------------------------------------------------------------------------------


@both
async def test_a_refusal_is_the_gateway_s_own_error(kind: str):
    dispatcher = saying("a")
    dispatcher.refusal = OverloadedError("no room", retry_after_s=2.5)
    error = await error_from(dispatcher, kind)
    assert (type(error), error.message, error.retry_after_s) == (OverloadedError, "no room", 2.5)


async def test_an_error_in_mid_answer_comes_after_what_was_said():
    script = Script([ids("the cat")], fail_at=1, error=WorkerLostError("decode-1 died"))

    def said_before_the_end(client: Client) -> list[str]:
        said: list[str] = []
        call = client.generate("x")
        with pytest.raises(WorkerLostError, match="decode-1 died"):
            said.extend(getattr(event, "text", "") for event in call)
        return said

    async with grpc_gateway(FakeDispatcher(script)) as address, AsyncClient(address) as client:
        call = client.generate("x")
        assert [type(await anext(call)), (await anext(call)).text] == [Started, "the"]  # type: ignore[union-attr]
        with pytest.raises(WorkerLostError, match="decode-1 died"):
            await anext(call)
        assert "".join(await in_thread(address, said_before_the_end)) == "the"


@both
@pytest.mark.parametrize("key", [None, "wrong"])
async def test_a_wrong_key_is_said_to_be_wrong(kind: str, key: str | None):
    assert isinstance(await error_from(saying("a"), kind, api_key=key), UnauthenticatedError)


async def test_wrong_fields_are_named_by_the_gateway():
    async with grpc_gateway(saying("a")) as address, AsyncClient(address) as client:
        with pytest.raises(InvalidRequestError) as caught:
            await client.complete("x", temperature=3.0)
        assert caught.value.param == "temperature"
        with pytest.raises(NotFoundError) as lost:
            await client.complete("x", model="other")
        assert lost.value.param == "model"
        assert (await client.complete("x")).text == "a"


@both
async def test_nobody_at_the_address(kind: str):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(UnavailableError, match=address):
        await ask(address, kind)


@both
async def test_the_timeout_ends_a_request_at_both_ends(kind: str):
    dispatcher = FakeDispatcher(Script([ids("the cat")], hang_at=1))
    async with grpc_gateway(dispatcher) as address:
        with pytest.raises(DeadlineExceededError):
            await ask(address, kind, settings={"timeout_s": 0.2})
        await eventually(dispatcher.all_closed)
    assert 0 < dispatcher.requests[0].deadline_s <= 0.2


class BreaksOff(InferenceServiceServicer):
    """Says what it was given, and ends its stream as if all were well."""

    def __init__(self, *events: GenerateResponse) -> None:
        self._events = events

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[GenerateResponse]:  # type: ignore[override]
        for event in self._events:
            yield event


@asynccontextmanager
async def breaking_off(*events: GenerateResponse) -> AsyncIterator[str]:
    server = grpc.aio.server()
    add_InferenceServiceServicer_to_server(BreaksOff(*events), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


@both
async def test_half_an_answer_is_never_taken_for_a_whole_one(kind: str):
    text = GenerateResponse(tokens={"ids": [5], "text": "half"})
    async with breaking_off(GenerateResponse(started={"request_id": "x"}), text) as address:
        with pytest.raises(UnavailableError, match="broke off"):
            await ask(address, kind)


async def test_events_of_a_newer_gateway_are_passed_over():
    started, finished = GenerateResponse(started={"request_id": "x"}), GenerateResponse(finished={})
    async with breaking_off(started, GenerateResponse(), finished) as address, AsyncClient(address) as client:
        assert [type(event) async for event in client.generate("x")] == [Started, Finished]


# -- letting go -------------------------------------------------------------------------------------------------------


def endless() -> FakeDispatcher:
    return FakeDispatcher(Script([ids("the cat sat on the mat")], hang_at=4, delay_s=0.001))


async def test_breaking_off_the_loop_cancels_the_request():
    dispatcher = endless()
    async with grpc_gateway(dispatcher) as address, AsyncClient(address) as client:
        async for event in client.generate("x"):
            if isinstance(event, TokenChunk):
                break
        await eventually(dispatcher.all_closed)


async def test_breaking_off_the_loop_in_a_thread_cancels_the_request():
    dispatcher = endless()

    def use(client: Client) -> None:
        for event in client.generate("x"):
            if isinstance(event, TokenChunk):
                break
        assert closed.wait(5)

    closed = threading.Event()
    async with grpc_gateway(dispatcher) as address:
        work = asyncio.create_task(in_thread(address, use))
        await eventually(lambda: bool(dispatcher.generations) and dispatcher.all_closed())
        closed.set()
        await work


async def test_leaving_the_block_cancels_the_request():
    dispatcher = endless()
    async with grpc_gateway(dispatcher) as address, AsyncClient(address) as client:
        async with client.generate("x") as events:
            await anext(events)
        await eventually(dispatcher.all_closed)
        async with aclosing(client.generate("x")) as events:
            await anext(events)
        await eventually(dispatcher.all_closed)
    assert len(dispatcher.generations) == 2


async def test_a_cancelled_task_cancels_its_request():
    dispatcher = endless()
    async with grpc_gateway(dispatcher) as address, AsyncClient(address) as client:
        task = asyncio.create_task(client.complete("x"))
        await eventually(lambda: bool(dispatcher.generations) and dispatcher.generations[0].num_events == 4)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await eventually(dispatcher.all_closed)


@both
async def test_closing_the_client_ends_what_runs(kind: str):
    dispatcher = endless()
    async with grpc_gateway(dispatcher) as address:
        client = Client(address) if kind == "blocking" else AsyncClient(address)
        run = asyncio.to_thread(client.complete, "x") if isinstance(client, Client) else client.complete("x")
        task = asyncio.ensure_future(run)
        await eventually(lambda: bool(dispatcher.generations) and dispatcher.generations[0].num_events == 4)
        await (asyncio.to_thread(client.close) if isinstance(client, Client) else client.aclose())
        with pytest.raises(CancelledByClientError):
            await task
        await eventually(dispatcher.all_closed)
        with pytest.raises(ValueError, match="closed"):
            client.generate("x")


async def test_a_call_that_is_closed_elsewhere_says_so():
    dispatcher = endless()
    async with grpc_gateway(dispatcher) as address, AsyncClient(address) as client:
        call = client.generate("x")
        task = asyncio.create_task(_last(call))
        await eventually(lambda: bool(dispatcher.generations) and dispatcher.generations[0].num_events == 4)
        await call.aclose()
        with pytest.raises(CancelledByClientError):
            await task


async def _last(call: Any) -> list[Event]:
    return [event async for event in call]


# -- the extra --------------------------------------------------------------------------------------------------------


def test_the_sdk_imports_grpc_and_protobuf_and_nothing_heavier():
    blocked = ("torch", "triton", "numpy", "fastapi", "starlette", "pydantic", "redis", "nixl", "httpx", "tokenizers")
    code = f"""
import sys
for name in {blocked!r}:
    sys.modules[name] = None
import tailrace.client
tailrace.client.Client("127.0.0.1:1").close()
rooms = {{name.split(".")[1] for name in sys.modules if name.startswith("tailrace.")}}
assert rooms == {{"client", "errors", "inference", "rpc", "types"}}, rooms
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

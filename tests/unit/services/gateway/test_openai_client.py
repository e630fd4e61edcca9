"""The official client against a real server."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import openai
import pytest

from services.gateway.generate import HttpOptions
from services.gateway.generation import Usage
from tailrace.errors import OverloadedError, WorkerLostError
from tests.helpers.fake_dispatcher import FakeDispatcher
from tests.helpers.gateway_app import MODEL, TOKENIZER, ids, make_app, saying, served

MESSAGES = [{"role": "user", "content": "hi"}]


@asynccontextmanager
async def openai_client(dispatcher: FakeDispatcher, api_key: str = "key") -> AsyncIterator[openai.AsyncOpenAI]:
    app = make_app(dispatcher, HttpOptions(api_keys=("key",)))
    async with (
        served(app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=api_key, max_retries=0) as client,
    ):
        yield client


async def test_chat_whole_and_streamed() -> None:
    async with openai_client(saying("the cat 🎈", usage=Usage(0, 0, cached_tokens=3))) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=1)
        assert answer.choices[0].message.content == "the cat 🎈"
        assert answer.choices[0].finish_reason == "stop"
        assert len(answer.choices[0].logprobs.content) == len(ids("the cat 🎈"))
        assert answer.usage.prompt_tokens == len(TOKENIZER.encode_chat(MESSAGES))
        assert answer.usage.prompt_tokens_details.cached_tokens == 3
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "the cat 🎈"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage == answer.usage


async def test_completions_whole_and_streamed() -> None:
    async with openai_client(saying("sat")) as client:
        answer = await client.completions.create(model=MODEL, prompt=["a", "b"], n=2, logprobs=1)
        assert [choice.text for choice in answer.choices] == ["sat"] * 4
        assert answer.choices[0].logprobs.text_offset[0] == 0
        stream = await client.completions.create(model=MODEL, prompt="a", stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "sat"


async def test_models() -> None:
    async with openai_client(saying("x")) as client:
        assert [model.id async for model in client.models.list()] == [MODEL, "cat"]
        assert (await client.models.retrieve(MODEL)).model_extra["max_model_len"] == 100


async def test_errors() -> None:
    dispatcher = saying("x")
    async with openai_client(dispatcher) as client:
        create = client.chat.completions.create
        with pytest.raises(openai.BadRequestError) as bad:
            await create(model=MODEL, messages=MESSAGES, n=1_000_000)
        assert (bad.value.param, bad.value.type) == ("n", "invalid_request_error")
        with pytest.raises(openai.BadRequestError) as long:
            await create(model=MODEL, messages=[{"role": "user", "content": "?" * 500}])
        assert long.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError) as unknown:
            await create(model="gpt-5", messages=MESSAGES)
        assert unknown.value.code == "model_not_found"
        dispatcher.refusal = OverloadedError("full", retry_after_s=4)
        with pytest.raises(openai.InternalServerError) as full:
            await create(model=MODEL, messages=MESSAGES)
        assert (full.value.status_code, full.value.response.headers["retry-after"]) == (503, "4")
    async with openai_client(dispatcher, api_key="wrong") as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()


async def test_an_error_in_the_middle_of_a_stream() -> None:
    async with openai_client(saying("abc", fail_at=2, error=WorkerLostError("gone"), delay_s=0.01)) as client:
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="gone"):
            async for _ in stream:
                pass


async def test_closing_a_stream_cancels_the_generation() -> None:
    dispatcher = saying("abc", hang_at=2)
    async with openai_client(dispatcher) as client:
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        await anext(aiter(stream))
        await stream.close()
        await dispatcher.generations[0].closed.wait()

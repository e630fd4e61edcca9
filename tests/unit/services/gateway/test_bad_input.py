"""Every wrong request is answered with OpenAI's error object, names its field, and leaves the next one alone."""

from typing import Any

import httpx
import pytest

from services.gateway.generate import HttpOptions
from services.gateway.prepare import RequestLimits
from tailrace.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    LayoutMismatchError,
    OverloadedError,
    TailraceError,
    TransferError,
    UnavailableError,
    WorkerLostError,
)
from tests.helpers.fake_dispatcher import FakeDispatcher
from tests.helpers.gateway_app import MAX_MODEL_LEN, MODEL, VOCAB_SIZE, client_of, ids, make_app, post, saying

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]  # type: ignore[no-any-return]


async def check(path: str, body: dict[str, Any], param: str, *words: str) -> dict[str, Any]:
    dispatcher = saying("ok")
    async with client_of(make_app(dispatcher)) as client:
        response = await client.post(path, json={"model": MODEL, **body})
        error = error_of(response)
        assert (response.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
        assert all(word in error["message"] for word in words), error["message"]
        assert dispatcher.generations == []
        assert (await client.post(CHAT, json={"model": MODEL, **HI})).status_code == 200
    return error


BIG = 10**30
COMMON: list[tuple[dict[str, Any], str]] = [
    ({"n": 1_000_000}, "n"),
    ({"n": 0}, "n"),
    ({"n": BIG}, "n"),
    ({"n": True}, "n"),
    ({"n": "2"}, "n"),
    ({"n": 1.5}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": BIG}, "max_tokens"),
    ({"max_tokens": "16"}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": BIG**20}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"seed": 2**64}, "seed"),
    ({"seed": "1"}, "seed"),
    ({"stop": 7}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": "x" * 1025}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": 3}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"logit_bias": []}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"²": 1}}, "logit_bias"),
    ({"logit_bias": {"9" * 50: 1}}, "logit_bias"),
    ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"1": True}}, "logit_bias"),
    ({"logit_bias": {"1": "1"}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
    ({"stop_token_ids": [BIG]}, "stop_token_ids"),
    ({"stop_token_ids": ["1"]}, "stop_token_ids[0]"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
    ({"priority": 2**31}, "priority"),
    ({"cache_salt": 5}, "cache_salt"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": "text"}, "response_format"),
    ({"guided_regex": "a+"}, "guided_regex"),
]


@pytest.mark.parametrize(("fields", "param"), COMMON)
async def test_fields_of_both(fields: dict[str, Any], param: str) -> None:
    await check(CHAT, HI | fields, param)
    await check(COMPLETIONS, {"prompt": "hi"} | fields, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [1]}]},
         "messages[1].tool_calls[0]"),
        ({"messages": [{"role": "tool", "content": "the template refuses"}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 4096}, "max_completion_tokens"),
        ({"logprobs": 3}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
    ],
)  # fmt: skip
async def test_fields_of_chat(fields: dict[str, Any], param: str) -> None:
    await check(CHAT, HI | fields, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": [1.0]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [VOCAB_SIZE]}, "prompt"),
        ({"prompt": [[5], [-1]]}, "prompt"),
        ({"prompt": [BIG]}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 0, "echo": True}, "logprobs"),
        ({"echo": "yes"}, "echo"),
        ({"prompt": ["a"] * 9, "n": 128}, "prompt"),
    ],
)
async def test_fields_of_completions(fields: dict[str, Any], param: str) -> None:
    await check(COMPLETIONS, {"prompt": "hi"} | fields, param)


async def test_fields_that_change_nothing_are_accepted() -> None:
    neutral = {
        "tools": [], "tool_choice": "none", "functions": None, "response_format": {"type": "text"}, "n": None,
        "stop": None, "logit_bias": None, "user": "me", "metadata": {"a": 1}, "surprise": [1, {"x": None}],
        "modalities": ["text"], "seed": None, "temperature": None, "best_of": None, "stream": None,
    }  # fmt: skip
    assert (await post(saying("ok"), CHAT, HI | neutral)).status_code == 200
    assert (await post(saying("ok"), COMPLETIONS, {"prompt": "a", "suffix": "", "best_of": 1})).status_code == 200


@pytest.mark.parametrize(("path", "param"), [(CHAT, "messages"), (COMPLETIONS, "prompt")])
async def test_a_prompt_longer_than_the_context_names_both_numbers(path: str, param: str) -> None:
    text = "?" * (2 * MAX_MODEL_LEN)
    body = HI | {"messages": [{"role": "user", "content": text}], "prompt": text}
    error = await check(path, body, param, str(MAX_MODEL_LEN))
    assert error["code"] == "context_length_exceeded"
    assert any(str(number) in error["message"] for number in range(2 * MAX_MODEL_LEN, 2 * MAX_MODEL_LEN + 20))


@pytest.mark.parametrize(("path", "param"), [(CHAT, "messages"), (COMPLETIONS, "prompt")])
async def test_a_text_that_cannot_fit_is_not_even_tokenized(path: str, param: str) -> None:
    text = "a" * 1_000_000
    body = HI | {"messages": [{"role": "user", "content": text}], "prompt": text}
    error = await check(path, body, param, "more than", str(MAX_MODEL_LEN))
    assert error["code"] == "context_length_exceeded"


async def test_more_tokens_than_fit_names_the_field_and_the_numbers() -> None:
    body = {"prompt": ids("hi"), "max_tokens": MAX_MODEL_LEN}
    error = await check(COMPLETIONS, body, "max_tokens", str(MAX_MODEL_LEN), str(len(ids("hi"))))
    assert error["code"] == "context_length_exceeded"


NESTED = b"[" * 50_000


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"hello", b"[]", b"3", b"null", b"\xff\xfe", NESTED, b'{"messages":' + NESTED + b"}",
     b'{"model":"\\ud800"}', b'{"n":' + b"9" * 10_000 + b"}", b"\x1f\x8b\x08"],
)  # fmt: skip
async def test_what_is_not_a_json_object(body: bytes) -> None:
    async with client_of(make_app(saying("ok"))) as client:
        response = await client.post(CHAT, content=body)
    assert response.status_code == 400
    assert error_of(response)["param"] is None


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_numbers_that_are_none(number: str) -> None:
    body = f'{{"model":"{MODEL}","prompt":"a","temperature":{number}}}'
    async with client_of(make_app(saying("ok"))) as client:
        response = await client.post(COMPLETIONS, content=body)
        assert (response.status_code, error_of(response)["param"]) == (400, "temperature")
        response = await client.post(COMPLETIONS, content=body.replace("temperature", "logit_bias"))
        assert (response.status_code, error_of(response)["param"]) == (400, "logit_bias")


async def test_a_key_twice_means_the_last() -> None:
    dispatcher = saying("ok")
    body = f'{{"model":"{MODEL}","prompt":"a","max_tokens":"x","max_tokens":3}}'
    async with client_of(make_app(dispatcher)) as client:
        assert (await client.post(COMPLETIONS, content=body)).status_code == 200
    assert dispatcher.requests[0].sampling.max_tokens == 3


async def test_unknown_and_missing_models() -> None:
    async with client_of(make_app(saying("ok"))) as client:
        response = await client.post(CHAT, json=HI | {"model": "gpt-5"})
        error = error_of(response)
        assert (response.status_code, error["param"], error["code"]) == (404, "model", "model_not_found")
        assert MODEL in error["message"]
        response = await client.post(CHAT, json=HI)
        assert (response.status_code, error_of(response)["param"]) == (400, "model")
        response = await client.get("/v1/models/gpt-5")
        assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/chat/completions/", "/v1/models/", "/nope", "/v1/%00", "//v1/models"]
)
async def test_unknown_routes(path: str) -> None:
    async with client_of(make_app(saying("ok"))) as client:
        response = await client.get(path)
    assert response.status_code == 404
    assert error_of(response)


async def test_wrong_methods_name_the_right_ones() -> None:
    async with client_of(make_app(saying("ok"))) as client:
        for method, path, allowed in [
            ("GET", CHAT, "POST"),
            ("POST", "/v1/models", "GET"),
            ("DELETE", "/health", "GET"),
        ]:
            response = await client.request(method, path)
            assert response.status_code == 405
            assert allowed in response.headers["allow"]
            assert error_of(response)["code"] == "method_not_allowed"


async def test_a_body_over_the_limit_by_its_length_and_by_its_chunks() -> None:
    async def endless() -> Any:
        for _ in range(1000):
            yield b"x" * 1000

    async with client_of(make_app(saying("ok"), HttpOptions(max_body_bytes=5000))) as client:
        for content in (b"x" * 5001, endless()):
            response = await client.post(CHAT, content=content)
            assert response.status_code == 413
            assert "5000" in error_of(response)["message"]
        assert (await client.post(CHAT, json=HI | {"model": MODEL})).status_code == 200


async def test_limits_are_options() -> None:
    options = HttpOptions(limits=RequestLimits(max_choices_per_prompt=2, max_choices=3))
    assert (await post(saying("ok"), COMPLETIONS, {"prompt": "a", "n": 2}, options=options)).status_code == 200
    response = await post(saying("ok"), COMPLETIONS, {"prompt": "a", "n": 3}, options=options)
    assert error_of(response)["message"] == "n must be at most 2"
    response = await post(saying("ok"), COMPLETIONS, {"prompt": ["a", "b"], "n": 2}, options=options)
    assert error_of(response)["param"] == "prompt"


REFUSALS: list[tuple[TailraceError, int, str | None]] = [
    (OverloadedError("no room", retry_after_s=2.2), 503, "overloaded"),
    (UnavailableError("no workers"), 503, "unavailable"),
    (WorkerLostError("the worker died"), 503, "worker_lost"),
    (TransferError("unreadable"), 503, "transfer_failed"),
    (DeadlineExceededError("too late"), 504, "deadline_exceeded"),
    (InvalidRequestError("too many", param="n"), 400, None),
    (LayoutMismatchError("secret detail"), 500, "internal_error"),
    (TailraceError("secret detail"), 500, "internal_error"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("refusal", "status", "code"), REFUSALS)
async def test_refusals_of_the_dispatcher(stream: bool, refusal: TailraceError, status: int, code: str | None) -> None:
    dispatcher = saying("ok")
    dispatcher.refusal = refusal
    response = await post(dispatcher, CHAT, HI | {"stream": stream})
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (status, code, refusal.param)
    assert "secret" not in response.text
    assert ("retry-after" in response.headers) == (status == 503)
    if isinstance(refusal, OverloadedError):
        assert response.headers["retry-after"] == "3"


async def test_a_refusal_in_the_middle_of_a_batch_gives_back_what_was_accepted() -> None:
    dispatcher = saying("ok")
    dispatcher.refusal, dispatcher.accepts = OverloadedError("full"), 2
    response = await post(dispatcher, COMPLETIONS, {"prompt": ["a", "b", "c"]})
    assert response.status_code == 503
    assert len(dispatcher.generations) == 2
    assert dispatcher.all_closed()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_defect_of_ours_tells_nothing_but_its_request_id(
    stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def break_down(_request: object) -> Any:
        raise ZeroDivisionError("secret detail")

    async with client_of(make_app(FakeDispatcher(break_down))) as client:
        response = await client.post(CHAT, json=HI | {"model": MODEL, "stream": stream})
    assert (response.status_code, error_of(response)["code"]) == (500, "internal_error")
    assert "secret" not in response.text
    assert response.headers["x-request-id"] in caplog.text


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic key-1"},
                                    {"Authorization": "key-1"}, {"Authorization": "Bearer "},
                                    {"Authorization": b"Bearer \xff\xfe"}])  # fmt: skip
async def test_api_keys(header: dict[str, Any]) -> None:
    async with client_of(make_app(saying("ok"), HttpOptions(api_keys=("key-1", "key-2")))) as client:
        for path in ("/v1/models", "/debug/kv", "/nope"):
            response = await client.get(path, headers=header)
            assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/health", "/ready", "/version", "/metrics"):
            assert (await client.get(path, headers=header)).status_code == 200
        assert (await client.get("/v1/models", headers={"Authorization": "Bearer key-2"})).status_code == 200

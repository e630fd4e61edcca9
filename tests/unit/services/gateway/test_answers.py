"""Whole answers: OpenAI's shapes, exact usage, what reaches the dispatcher."""

from dataclasses import replace
from typing import Any

import httpx
import pytest

from services.gateway.generate import HttpOptions
from services.gateway.generation import GenerationRequest, Usage
from tailrace import __version__
from tailrace.kv.layout import KVLayout
from tailrace.types import FinishReason, TokenLogprob
from tests.helpers.fake_dispatcher import FakeDispatcher, Script
from tests.helpers.fake_members import LAYOUT
from tests.helpers.gateway_app import EOS, MAX_MODEL_LEN, MODEL, TOKENIZER, client_of, ids, make_app, post, saying

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
HI_IDS = TOKENIZER.encode_chat(HI["messages"])


async def ok(dispatcher: FakeDispatcher, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = await post(dispatcher, path, body)
    assert response.status_code == 200, response.text
    assert dispatcher.all_closed()
    return response.json()  # type: ignore[no-any-return]


async def test_chat() -> None:
    usage = Usage(0, 0, 7, 0.001, 0.02, 0.003, 4096, "nixl", 0.4, 0.05, {"gpu": 4, "cpu": 3})
    dispatcher = saying("the cat, 日本", usage=usage)
    answer = await ok(dispatcher, CHAT, HI)
    assert answer["object"] == "chat.completion"
    assert answer["id"] == dispatcher.requests[0].request_id
    assert answer["model"] == MODEL
    message = {"role": "assistant", "content": "the cat, 日本", "refusal": None}
    assert answer["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    num_tokens = len(ids("the cat, 日本")) + 1
    assert answer["usage"] == {
        "prompt_tokens": len(HI_IDS),
        "completion_tokens": num_tokens,
        "total_tokens": len(HI_IDS) + num_tokens,
        "prompt_tokens_details": {"cached_tokens": 7},
        "tailrace": {
            "queue_ms": 1.0, "prefill_ms": 20.0, "transfer_ms": 3.0, "decode_ms": 400.0, "ttft_ms": 50.0,
            "transport": "nixl", "transfer_bytes": 4096, "cached_tokens_by_tier": {"cpu": 3, "gpu": 4},
        },
    }  # fmt: skip


async def test_defaults_are_openais() -> None:
    chat, completion = saying("ok"), saying("ok")
    await ok(chat, CHAT, HI)
    await ok(completion, COMPLETIONS, {"prompt": "hi"})
    request = chat.requests[0]
    assert request.prompt_tokens == HI_IDS
    assert request.sampling.max_tokens == MAX_MODEL_LEN - len(HI_IDS)
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.top_k) == (1.0, 1.0, 0)
    assert (request.num_choices, request.priority, request.cache_salt) == (1, 0, "")
    assert 0 < request.deadline_s <= 600
    assert completion.requests[0].sampling.max_tokens == 16
    seeds = {chat.requests[0].sampling.seed, completion.requests[0].sampling.seed}
    assert len(seeds) == 2
    assert max(seeds) > 2**32


async def test_the_default_of_a_completion_is_less_where_less_fits() -> None:
    dispatcher = saying("ok")
    await ok(dispatcher, COMPLETIONS, {"prompt": [5] * (MAX_MODEL_LEN - 3)})
    assert dispatcher.requests[0].sampling.max_tokens == 3


async def test_every_field_reaches_the_dispatcher() -> None:
    fields = {
        "temperature": 0, "top_p": 0.5, "top_k": 10**9, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": -1,
        "frequency_penalty": 0.25, "logit_bias": {"5": -100, "6": 1.5}, "min_tokens": 2, "ignore_eos": True, "seed": -1,
        "stop_token_ids": [9, 10], "priority": -3, "cache_salt": "tenant", "n": 3, "max_tokens": 12,
    }  # fmt: skip
    dispatcher = saying("ok")
    await ok(dispatcher, CHAT, HI | fields | {"max_completion_tokens": 13, "logprobs": True, "top_logprobs": 4})
    request = dispatcher.requests[0]
    sampling = request.sampling
    assert (request.num_choices, request.priority, request.cache_salt) == (3, -3, "tenant")
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0, 0.5, 512, 0.1)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.2, -1, 0.25)
    assert sampling.logit_bias == ((5, -100.0), (6, 1.5))
    assert (sampling.min_tokens, sampling.ignore_eos, sampling.stop_token_ids) == (2, True, (9, 10))
    assert (sampling.seed, sampling.max_tokens, sampling.logprobs) == (2**64 - 1, 13, 4)


async def test_content_parts_and_roles() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": parts, "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    dispatcher = saying("ok")
    await ok(dispatcher, CHAT, {"messages": messages})
    as_text = [("system", "be brief"), ("user", "a\nb"), ("assistant", "")]
    expected = TOKENIZER.encode_chat([{"role": role, "content": content} for role, content in as_text])
    assert dispatcher.requests[0].prompt_tokens == expected


async def test_batches_of_prompts_times_choices() -> None:
    def script(request: GenerationRequest) -> Script:
        text = TOKENIZER.vocabulary[request.prompt_tokens[0]].decode()
        usage = Usage(0, 0, cached_tokens=2, transfer_s=0.1, transfer_bytes=10, transport="stream", decode_s=1.0)
        return Script([[*ids(text + "1"), EOS], ids(text + "22")], usage=usage)

    dispatcher = FakeDispatcher(script)
    answer = await ok(dispatcher, COMPLETIONS, {"prompt": ["a", "b", "c"], "n": 2, "seed": 5})
    texts = [(choice["index"], choice["text"]) for choice in answer["choices"]]
    assert texts == [(0, "a1"), (1, "a22"), (2, "b1"), (3, "b22"), (4, "c1"), (5, "c22")]
    assert [request.prompt_tokens for request in dispatcher.requests] == [ids("a"), ids("b"), ids("c")]
    assert {request.sampling.seed for request in dispatcher.requests} == {5}
    assert len({request.request_id for request in dispatcher.requests}) == 3
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 3 * (3 + 3))
    assert usage["prompt_tokens_details"]["cached_tokens"] == 6
    assert (usage["tailrace"]["transfer_bytes"], usage["tailrace"]["decode_ms"]) == (30, 1000)


@pytest.mark.parametrize("prompt", ["the cat", ["the cat"], ids("the cat"), [ids("the cat")]])
async def test_the_four_shapes_of_a_prompt(prompt: Any) -> None:
    dispatcher = saying(" sat")
    answer = await ok(dispatcher, COMPLETIONS, {"prompt": prompt, "echo": True})
    assert dispatcher.requests[0].prompt_tokens == ids("the cat")
    assert answer["choices"] == [{"index": 0, "text": "the cat sat", "logprobs": None, "finish_reason": "stop"}]


async def test_echo_of_every_prompt_and_choice() -> None:
    answer = await ok(saying("!"), COMPLETIONS, {"prompt": ["a", "b"], "n": 2, "echo": True})
    assert [choice["text"] for choice in answer["choices"]] == ["a!", "a!", "b!", "b!"]


async def test_length() -> None:
    dispatcher = FakeDispatcher(Script([ids("abc")], reason=FinishReason.LENGTH))
    answer = await ok(dispatcher, COMPLETIONS, {"prompt": "x", "max_tokens": 3})
    assert (answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", 3)


@pytest.mark.parametrize("tokens_per_event", [1, 3, 100])
async def test_a_stop_string_across_tokens(tokens_per_event: int) -> None:
    dispatcher = saying("one. two! three", tokens_per_event=tokens_per_event)
    answer = await ok(dispatcher, CHAT, HI | {"stop": ["two!", "zzz"], "n": 2})
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["one. ", "one. "]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
    assert sorted(dispatcher.generations[0].finished) == [0, 1]
    assert answer["usage"]["completion_tokens"] == 2 * len(ids("one. two!"))


async def test_a_stop_string_may_be_included() -> None:
    answer = await ok(saying("a. b"), CHAT, HI | {"stop": ".", "include_stop_str_in_output": True})
    assert answer["choices"][0]["message"]["content"] == "a."


async def test_half_a_stop_string_at_the_end_is_text() -> None:
    answer = await ok(saying("STO"), CHAT, HI | {"stop": "STOP"})
    assert (answer["choices"][0]["message"]["content"], answer["choices"][0]["finish_reason"]) == ("STO", "stop")


async def test_stop_ids_and_special_tokens_in_the_output() -> None:
    dot = ids(".")[0]
    script = Script([[*ids("a"), 0, dot]])
    for fields, text in (
        ({}, "a."),
        ({"stop_token_ids": [dot]}, "a"),
        ({"skip_special_tokens": False}, "a<|endoftext|>."),
    ):
        answer = await ok(FakeDispatcher(script), CHAT, HI | fields)
        assert answer["choices"][0]["message"]["content"] == text
        assert answer["usage"]["completion_tokens"] == 3


async def test_eos_is_hidden_even_when_special_tokens_are_shown_unless_ignored() -> None:
    script = Script([[*ids("a"), EOS, *ids("b")]])
    hidden = {"skip_special_tokens": False}
    answer = await ok(FakeDispatcher(script), CHAT, HI | hidden)
    assert answer["choices"][0]["message"]["content"] == "ab"
    answer = await ok(FakeDispatcher(script), CHAT, HI | hidden | {"ignore_eos": True})
    assert answer["choices"][0]["message"]["content"] == "a<|im_end|>b"


async def test_chat_logprobs_tell_bytes_that_join_to_the_content() -> None:
    text = "the 🎈"
    answer = await ok(saying(text), CHAT, HI | {"logprobs": True, "top_logprobs": 2})
    content = answer["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == text
    assert len(content) == len(ids(text))
    first = content[0]
    assert (first["token"], first["logprob"]) == (TOKENIZER.vocabulary[ids(text)[0]].decode(), -0.5)
    assert [entry["logprob"] for entry in first["top_logprobs"]] == [-0.5, -1.5]
    assert content[-1]["token"] == "".join(f"\\x{byte:02x}" for byte in content[-1]["bytes"])
    answer = await ok(saying(text), CHAT, HI | {"logprobs": True})
    assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_completion_logprobs() -> None:
    text = "the 🎈"
    answer = await ok(saying(text), COMPLETIONS, {"prompt": "x", "logprobs": 1})
    logprobs = answer["choices"][0]["logprobs"]
    assert set(logprobs) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert {len(column) for column in logprobs.values()} == {len(ids(text))}
    assert logprobs["token_logprobs"] == [-0.5] * len(ids(text))
    assert logprobs["tokens"][-1].startswith("bytes:\\x")
    assert logprobs["top_logprobs"][0] == {logprobs["tokens"][0]: -0.5}
    assert logprobs["text_offset"][-1] == len("the ")
    assert logprobs["text_offset"][0] == 0
    assert text.startswith(logprobs["tokens"][0])


async def test_logprobs_end_where_a_stop_string_cuts() -> None:
    answer = await ok(saying("ab.c"), CHAT, HI | {"logprobs": True, "stop": "."})
    content = answer["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == "ab" == answer["choices"][0]["message"]["content"]


async def test_impossible_tokens_have_a_finite_logprob() -> None:
    class Impossible(FakeDispatcher):
        async def submit(self, request: GenerationRequest) -> Any:
            generation = await super().submit(request)
            generation._logprobs = lambda part: [TokenLogprob(float("-inf"), ((5, float("-inf")),)) for _ in part]
            return generation

    answer = await ok(Impossible(Script([[*ids("a"), EOS]])), CHAT, HI | {"logprobs": True, "top_logprobs": 1})
    assert answer["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0


async def test_trace_context_and_request_ids() -> None:
    dispatcher = saying("ok")
    trace = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "tracestate": "k=v"}
    async with client_of(make_app(dispatcher)) as client:
        for headers, echoed in [
            ({"X-Request-Id": "my-id.1"}, True),
            ({"X-Request-Id": "bad id\n"}, False),
            (trace, False),
        ]:
            response = await client.post(CHAT, json=HI | {"model": MODEL}, headers=headers)
            assert (response.headers["x-request-id"] == headers.get("X-Request-Id")) == echoed
            assert response.headers["x-request-id"]
        await client.post(CHAT, json=HI | {"model": MODEL}, headers=trace | {"traceparent": "nonsense"})
    assert [(r.traceparent, r.tracestate) for r in dispatcher.requests[2:]] == [
        (trace["traceparent"], "k=v"), ("", "")]  # fmt: skip
    assert len({request.request_id for request in dispatcher.requests}) == 4


async def get(path: str, **options: Any) -> httpx.Response:
    async with client_of(make_app(saying("ok"), **options)) as client:
        return await client.get(path)


async def test_models() -> None:
    models = (await get("/v1/models")).json()
    assert [model["id"] for model in models["data"]] == [MODEL, "cat"]
    one = (await get(f"/v1/models/{MODEL}")).json()
    assert one == models["data"][0]
    assert (one["object"], one["max_model_len"], one["created"]) == ("model", MAX_MODEL_LEN, 1_700_000_000)
    answer = await ok(saying("ok"), CHAT, HI | {"model": "cat"})
    assert answer["model"] == "cat"


async def test_models_say_what_their_workers_compute_in() -> None:
    async def said(*layouts: KVLayout) -> tuple[str | None, str | None]:
        model = (await get("/v1/models/cat", layouts=layouts)).json()
        return model["dtype"], model["quantization"]

    plain, int8 = replace(LAYOUT, kv_dtype="bfloat16"), replace(LAYOUT, kv_dtype="bfloat16", quantization="int8")
    assert await said() == (None, None)
    assert await said(int8, int8) == ("bfloat16", "int8")
    assert await said(plain, int8) == ("bfloat16", "int8, none")


async def test_health_version_readiness_and_blocks() -> None:
    assert (await get("/health", not_ready=["no workers"])).status_code == 200
    assert (await get("/version")).json() == {"version": __version__}
    assert (await get("/ready")).status_code == 200
    response = await get("/ready", not_ready=["no decode worker"])
    assert (response.status_code, response.headers["retry-after"]) == (503, "2")
    assert response.json()["reasons"] == ["no decode worker"]
    assert (await get("/debug/kv")).json() == {"workers": []}


async def test_metrics_count_requests_and_time_tokens() -> None:
    async with client_of(make_app(saying("the cat sat"))) as client:
        await client.post(CHAT, json=HI | {"model": MODEL})
        await client.get("/nope/1")
        await client.get("/nope/2")
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = response.text.splitlines()
    assert 'tailrace_http_requests_total{method="POST",route="/v1/chat/completions",status="200"} 1.0' in lines
    assert 'tailrace_http_requests_total{method="GET",route="none",status="404"} 2.0' in lines
    assert "tailrace_http_ttft_seconds_count 1.0" in lines
    assert "tailrace_http_tpot_seconds_count 1.0" in lines
    num_gaps = len(ids("the cat sat")) - 1
    assert f"tailrace_http_icl_seconds_count {num_gaps:.1f}" in lines
    assert f'tailrace_http_tokens_total{{kind="prompt"}} {len(HI_IDS):.1f}' in lines
    assert "tailrace_other 1.0" in lines


async def test_options_of_the_template_reach_it() -> None:
    dispatcher = saying("ok")
    await ok(dispatcher, CHAT, HI | {"chat_template_kwargs": {"messages": [], "x": 1}})
    assert dispatcher.requests[0].prompt_tokens == HI_IDS


async def test_the_deadline_is_an_option() -> None:
    dispatcher = saying("ok")
    await post(dispatcher, CHAT, HI, options=HttpOptions(request_deadline_s=5))
    assert 4 < dispatcher.requests[0].deadline_s <= 5

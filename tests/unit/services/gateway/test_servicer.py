"""`Generate` as the wire shows it: statuses, trailers, events, and what is left when a client leaves."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from services.gateway.generation import GenerationRequest
from services.gateway.inference import InferenceOptions, Outbox
from tailrace.errors import (
    InvalidRequestError,
    OverloadedError,
    TailraceError,
    UnauthenticatedError,
    UnavailableError,
    WorkerLostError,
)
from tailrace.inference import Finished, TokenChunk, Usage
from tailrace.rpc.convert_inference import error_from_trailers
from tailrace.rpc.gen import control_pb2_grpc, error_pb2
from tailrace.rpc.gen.generation_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP, GenerateRequest, GenerateResponse
from tailrace.rpc.gen.generation_pb2_grpc import InferenceServiceStub
from tailrace.rpc.options import CHANNEL_OPTIONS
from tailrace.types import FinishReason, TokenLogprob
from tests.helpers.fake_dispatcher import FakeDispatcher, FakeGeneration, Script
from tests.helpers.gateway_app import EOS, MAX_MODEL_LEN, MODEL, ids, post, saying
from tests.helpers.grpc_gateway import grpc_gateway

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@asynccontextmanager
async def stub_of(dispatcher: Any, options: InferenceOptions | None = None) -> AsyncIterator[InferenceServiceStub]:
    async with grpc_gateway(dispatcher, options) as address, grpc.aio.insecure_channel(address) as channel:
        yield InferenceServiceStub(channel)


async def ask(dispatcher: FakeDispatcher, request: GenerateRequest, **options: Any) -> list[GenerateResponse]:
    async with stub_of(dispatcher, InferenceOptions(**options)) as stub:
        return [event async for event in stub.Generate(request)]


async def refusal(
    dispatcher: FakeDispatcher, request: GenerateRequest, metadata: Any = (), **options: Any
) -> tuple[grpc.StatusCode, TailraceError]:
    async with stub_of(dispatcher, InferenceOptions(**options)) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [event async for event in stub.Generate(request, metadata=metadata)]
    told = error_from_trailers(caught.value.trailing_metadata())
    assert told is not None
    assert told.message == caught.value.details()
    return caught.value.code(), told


def text_of(events: Sequence[GenerateResponse], choice: int = 0) -> str:
    return "".join(event.tokens.text for event in events if event.HasField("tokens") and event.tokens.choice == choice)


def ids_of(events: Sequence[GenerateResponse], choice: int = 0) -> list[int]:
    return [
        i for event in events if event.HasField("tokens") and event.tokens.choice == choice for i in event.tokens.ids
    ]


async def test_a_text_is_answered_with_started_tokens_and_finished():
    usage = Usage(0, 0, 1, 0.1, 0.2, 0.3, 400, "nixl", 0.5, 0.6, {"gpu": 1})
    dispatcher = saying("a cat", usage=usage, delay_s=0.001)
    events = await ask(dispatcher, GenerateRequest(request_id="mine-1", text="the cat sat"))
    started = events[0].started
    assert (started.request_id, started.num_prompt_tokens) == ("mine-1", len(ids("the cat sat")))
    assert started.seed == dispatcher.requests[0].sampling.seed
    assert text_of(events) == "a cat"
    assert ids_of(events) == [*ids("a cat"), EOS]
    assert [e.tokens.finish_reason for e in events[1:-1]] == [0] * (len(events) - 3) + [FINISH_REASON_STOP]
    finished = events[-1].finished.usage
    assert (finished.prompt_tokens, finished.completion_tokens) == (len(ids("the cat sat")), len(ids("a cat")) + 1)
    timing = finished.timing
    assert (timing.queue_s, timing.prefill_s, timing.transfer_s, timing.transfer_bytes) == (0.1, 0.2, 0.3, 400)
    assert (timing.transport, timing.decode_s, timing.ttft_s) == ("nixl", 0.5, 0.6)
    assert (finished.cached_tokens, dict(finished.cached_tokens_by_tier)) == (1, {"gpu": 1})


async def test_positions_follow_the_prompt_and_one_another():
    dispatcher = saying("the cat sat on the mat", delay_s=0.001)
    events = await ask(dispatcher, GenerateRequest(tokens={"ids": [5, 6, 7]}))
    position = 3
    for event in events[1:-1]:
        assert event.tokens.position == position
        position += len(event.tokens.ids)
    assert position == 3 + len(ids("the cat sat on the mat")) + 1


async def test_no_chunk_ever_splits_a_character():
    text = "héllo 👩‍👩‍👧 日本 🎉"
    dispatcher = saying(text, delay_s=0.001)
    events = await ask(dispatcher, GenerateRequest(text="x"))
    assert len(events) > 5
    assert text_of(events) == text
    assert all("\ufffd" not in event.tokens.text for event in events)


async def test_a_chat_goes_through_the_model_s_template():
    chat, over_http = saying("hi"), saying("hi")
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "cat?"}]
    await ask(chat, GenerateRequest(chat={"messages": messages}))
    await post(over_http, "/v1/chat/completions", {"messages": messages})
    assert chat.requests[0].prompt_tokens == over_http.requests[0].prompt_tokens
    assert chat.requests[0].sampling.max_tokens == MAX_MODEL_LEN - len(chat.requests[0].prompt_tokens)


async def test_every_sampling_field_reaches_the_workers_as_over_http():
    sampling = {
        "max_tokens": 7,
        "temperature": 0.5,
        "top_k": 9,
        "top_p": 0.75,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.25,
        "logit_bias": {3: 2.5},
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [11, 12],
        "logprobs": 3,
        "seed": 2**64 - 1,
        "n": 2,
    }
    ours, theirs = saying("a"), saying("a")
    await ask(ours, GenerateRequest(text="x", sampling=sampling, priority=-3, cache_salt="mine"))
    body = {**sampling, "prompt": "x", "logit_bias": {"3": 2.5}, "priority": -3, "cache_salt": "mine"}
    assert (await post(theirs, "/v1/completions", body)).status_code == 200
    mine, other = ours.requests[0], theirs.requests[0]
    assert mine.sampling == other.sampling
    assert (mine.num_choices, mine.priority, mine.cache_salt) == (other.num_choices, -3, "mine")


async def test_zero_and_unset_are_told_apart():
    greedy, default = saying("a"), saying("a")
    await ask(greedy, GenerateRequest(text="x", sampling={"temperature": 0.0, "seed": 0, "logprobs": 0}))
    await ask(default, GenerateRequest(text="x"))
    zero, unset = greedy.requests[0].sampling, default.requests[0].sampling
    assert (zero.temperature, zero.seed, zero.logprobs) == (0.0, 0, 0)
    assert (unset.temperature, unset.max_tokens, unset.logprobs) == (1.0, 16, None)


async def test_choices_have_their_own_texts_and_reasons():
    dispatcher = FakeDispatcher(Script([ids("one cat"), ids("two")], reason=FinishReason.LENGTH))
    events = await ask(dispatcher, GenerateRequest(text="x", sampling={"n": 2}))
    assert (text_of(events, 0), text_of(events, 1)) == ("one cat", "two")
    ends = {e.tokens.choice: e.tokens.finish_reason for e in events if e.tokens.finish_reason}
    assert ends == {0: FINISH_REASON_LENGTH, 1: FINISH_REASON_LENGTH}


async def test_log_probabilities_come_one_an_id():
    events = await ask(saying("a cat"), GenerateRequest(text="x", sampling={"logprobs": 2}))
    tokens = [event.tokens for event in events if event.HasField("tokens")]
    assert sum(len(t.ids) for t in tokens) == len(ids("a cat")) + 1
    for part in tokens:
        assert len(part.logprobs) == len(part.ids)
        assert [list(s.top_ids) for s in part.logprobs] == [[i, i + 1] for i in part.ids]
        assert all(s.logprob == -0.5 for s in part.logprobs)


@pytest.mark.parametrize("per_event", [1, 100])
async def test_a_stop_string_ends_its_choice_and_is_not_shown(per_event: int):
    dispatcher = FakeDispatcher(Script([ids("the cat sat on the mat")], tokens_per_event=per_event, delay_s=0.001))
    events = await ask(dispatcher, GenerateRequest(text="x", stop=["t sa"]))
    assert text_of(events) == "the ca"
    assert events[-2].tokens.finish_reason == FINISH_REASON_STOP
    assert dispatcher.generations[0].finished == [0]
    assert events[-1].finished.usage.completion_tokens == len(ids_of(events)) < len(ids("the cat sat on the mat"))


async def test_what_was_held_back_for_a_stop_string_comes_with_the_end():
    dispatcher = FakeDispatcher(Script([ids("the cat")], reason=FinishReason.LENGTH))
    events = await ask(dispatcher, GenerateRequest(text="x", stop=["cat sat"]))
    assert text_of(events) == "the cat"
    assert ids_of(events) == ids("the cat")


async def test_deadline_trace_and_model_name_are_passed_on():
    dispatcher = saying("a")
    trace = {"traceparent": TRACEPARENT, "tracestate": "a=1"}
    await ask(dispatcher, GenerateRequest(text="x", model=MODEL, deadline_s=2.5, trace=trace))
    await ask(
        dispatcher, GenerateRequest(text="x", trace={"traceparent": "nonsense", "tracestate": "a=1"}), deadline_s=9
    )
    named, unnamed = dispatcher.requests
    assert (named.deadline_s, named.traceparent, named.tracestate) == (2.5, TRACEPARENT, "a=1")
    assert (unnamed.deadline_s, unnamed.traceparent, unnamed.tracestate) == (9, "", "")


# -- refusals ---------------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "prompt"),
    ({"text": ""}, "prompt"),
    ({"tokens": {}}, "prompt"),
    ({"tokens": {"ids": [512]}}, "prompt"),
    ({"tokens": {"ids": [5] * MAX_MODEL_LEN}}, "prompt"),
    ({"text": "cat " * 10_000}, "prompt"),
    ({"chat": {}}, "messages"),
    ({"chat": {"messages": [{"role": "cat", "content": "x"}]}}, "messages[0].role"),
    ({"text": "x", "model": "other"}, "model"),
    ({"text": "x", "request_id": "a\nb"}, "request_id"),
    ({"text": "x", "deadline_s": -1.0}, "deadline_s"),
    ({"text": "x", "deadline_s": float("nan")}, "deadline_s"),
    ({"text": "x", "deadline_s": 1e6}, "deadline_s"),
    ({"text": "x", "stop": [""]}, "stop"),
    ({"text": "x", "stop": ["a"] * 17}, "stop"),
    ({"text": "x", "cache_salt": "a" * 1025}, "cache_salt"),
    ({"text": "x", "sampling": {"max_tokens": 0}}, "max_tokens"),
    ({"text": "x", "sampling": {"max_tokens": MAX_MODEL_LEN}}, "max_tokens"),
    ({"text": "x", "sampling": {"temperature": 2.5}}, "temperature"),
    ({"text": "x", "sampling": {"temperature": float("nan")}}, "temperature"),
    ({"text": "x", "sampling": {"top_p": 0.0}}, "top_p"),
    ({"text": "x", "sampling": {"min_p": float("inf")}}, "min_p"),
    ({"text": "x", "sampling": {"repetition_penalty": 0.0}}, "repetition_penalty"),
    ({"text": "x", "sampling": {"presence_penalty": -3.0}}, "presence_penalty"),
    ({"text": "x", "sampling": {"frequency_penalty": 3.0}}, "frequency_penalty"),
    ({"text": "x", "sampling": {"logit_bias": {512: 1.0}}}, "logit_bias"),
    ({"text": "x", "sampling": {"logit_bias": {5: 101.0}}}, "logit_bias"),
    ({"text": "x", "sampling": {"stop_token_ids": [512]}}, "stop_token_ids"),
    ({"text": "x", "sampling": {"min_tokens": 17}}, "min_tokens"),
    ({"text": "x", "sampling": {"logprobs": 6}}, "logprobs"),
    ({"chat": {"messages": [{"role": "user", "content": "x"}]}, "sampling": {"logprobs": 21}}, "logprobs"),
    ({"text": "x", "sampling": {"n": 1_000_000}}, "n"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=[f"{p}-{i}" for i, (_, p) in enumerate(WRONG)])
async def test_a_wrong_field_is_named_before_anything_is_accepted(fields: dict[str, Any], param: str):
    dispatcher = saying("a")
    code, told = await refusal(dispatcher, GenerateRequest(**fields))
    kind = grpc.StatusCode.NOT_FOUND if param == "model" else grpc.StatusCode.INVALID_ARGUMENT
    assert (code, told.param) == (kind, param)
    assert param.split("[")[0] in told.message
    assert dispatcher.requests == []


async def test_a_request_of_many_bytes_is_refused_unread():
    code, told = await refusal(saying("a"), GenerateRequest(text="x" * 5000), max_request_bytes=4096)
    assert (code, told.param) == (grpc.StatusCode.INVALID_ARGUMENT, "prompt")
    assert "4096" in told.message


async def test_a_busy_gateway_says_when_to_come_back():
    dispatcher = saying("a")
    dispatcher.refusal = OverloadedError("no room", retry_after_s=2.5)
    code, told = await refusal(dispatcher, GenerateRequest(text="x"))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (type(told), told.retryable, told.retry_after_s) == (OverloadedError, True, 2.5)
    dispatcher.refusal = UnavailableError("no pair", retry_after_s=1.0)
    code, told = await refusal(dispatcher, GenerateRequest(text="x"))
    assert (code, told.retry_after_s) == (grpc.StatusCode.UNAVAILABLE, 1.0)


@pytest.mark.parametrize("defect", [RuntimeError("secret detail"), TailraceError("secret detail")])
async def test_a_defect_tells_no_details(defect: Exception):
    dispatcher = saying("a")
    dispatcher.refusal = defect  # type: ignore[assignment]
    code, told = await refusal(dispatcher, GenerateRequest(text="x"))
    assert code is grpc.StatusCode.INTERNAL
    assert "secret" not in told.message


@pytest.mark.parametrize("given", [None, "Bearer wrong", "Basic right-1", "right-1", "Bearer ", "Bearer right-12"])
async def test_a_call_without_a_valid_key_is_refused(given: str | None):
    metadata = [("authorization", given)] if given is not None else []
    dispatcher = saying("a")
    code, told = await refusal(dispatcher, GenerateRequest(text="x"), metadata, api_keys=("right-1", "right-2"))
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert isinstance(told, UnauthenticatedError)
    assert dispatcher.requests == []


@pytest.mark.parametrize("given", ["Bearer right-1", "bearer right-2"])
async def test_any_of_the_keys_opens(given: str):
    async with stub_of(saying("a"), InferenceOptions(api_keys=("right-1", "right-2"))) as stub:
        call = stub.Generate(GenerateRequest(text="x"), metadata=[("authorization", given)])
        assert text_of([event async for event in call]) == "a"


async def test_an_api_key_does_not_open_the_cluster():
    async with grpc_gateway(saying("a")) as address, grpc.aio.insecure_channel(address) as channel:
        call = control_pb2_grpc.MembershipServiceStub(channel).Join(metadata=[("authorization", "Bearer x")])
        assert await call.code() is grpc.StatusCode.UNAUTHENTICATED


# -- after acceptance -------------------------------------------------------------------------------------------------


async def test_a_failure_after_acceptance_is_one_last_event():
    script = Script([ids("the cat sat")], fail_at=2, error=WorkerLostError("decode-1 died", retry_after_s=0.5))
    events = await ask(FakeDispatcher(script), GenerateRequest(text="x"))
    assert events[0].HasField("started")
    assert text_of(events) == "the cat"
    error = events[-1].error
    assert (error.code, error.retryable, error.retry_after_s) == (error_pb2.ERROR_CODE_WORKER_LOST, True, 0.5)
    assert error.message == "decode-1 died"
    assert [event.WhichOneof("event") for event in events].count("error") == 1


@pytest.mark.parametrize("defect", [ValueError("secret detail"), TailraceError("secret detail")])
async def test_a_defect_after_acceptance_tells_the_request_s_id_and_no_details(defect: Exception):
    dispatcher = FakeDispatcher(Script([ids("the cat")], fail_at=1, error=defect))
    events = await ask(dispatcher, GenerateRequest(text="x", request_id="mine"))
    assert events[-1].error.code == error_pb2.ERROR_CODE_INTERNAL
    assert "secret" not in events[-1].error.message
    assert "request mine" in events[-1].error.message
    assert dispatcher.all_closed()


async def test_the_next_request_is_fine_after_a_failed_one():
    scripts = iter([Script([ids("a")], fail_at=0, error=WorkerLostError("lost")), Script([[*ids("a cat"), EOS]])])
    dispatcher = FakeDispatcher(lambda request: next(scripts))
    async with stub_of(dispatcher) as stub:
        first = [event async for event in stub.Generate(GenerateRequest(text="x"))]
        second = [event async for event in stub.Generate(GenerateRequest(text="x"))]
    assert (first[-1].WhichOneof("event"), text_of(second)) == ("error", "a cat")


# -- clients that leave or do not read --------------------------------------------------------------------------------


async def eventually(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 (the server has nothing to wait for)
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("num_events", range(6))
async def test_a_client_that_leaves_cancels_its_request(num_events: int):
    """Event 5 of the generation never comes."""
    dispatcher = FakeDispatcher(Script([ids("the cat sat on the mat")], hang_at=5, delay_s=0.001))
    async with stub_of(dispatcher) as stub:
        call = stub.Generate(GenerateRequest(text="x"))
        for _ in range(num_events and 1):
            await call.read()
        await eventually(lambda: dispatcher.generations and dispatcher.generations[0].num_events >= num_events)
        call.cancel()
        await eventually(dispatcher.all_closed)
    assert dispatcher.generations[0].num_events < 6


class SlowToAccept(FakeDispatcher):
    """Stays in submit for ever; `was_cancelled` when somebody ended that."""

    was_cancelled = False
    has_begun = False

    async def submit(self, request: GenerationRequest) -> FakeGeneration:
        self.has_begun = True
        try:
            return await asyncio.Event().wait()  # type: ignore[return-value]
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise


async def test_a_client_that_leaves_before_acceptance_is_not_submitted():
    dispatcher = SlowToAccept(Script([[EOS]]))
    async with stub_of(dispatcher) as stub:
        call = stub.Generate(GenerateRequest(text="x"))
        await eventually(lambda: dispatcher.has_begun)
        call.cancel()
        await eventually(lambda: dispatcher.was_cancelled)


async def test_the_deadline_of_the_call_cancels_as_well():
    dispatcher = FakeDispatcher(Script([ids("the cat")], hang_at=1))
    async with stub_of(dispatcher) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [event async for event in stub.Generate(GenerateRequest(text="x"), timeout=0.2)]
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await eventually(dispatcher.all_closed)


def large(num_tokens: int) -> FakeDispatcher:
    return FakeDispatcher(Script([[5] * num_tokens], tokens_per_event=50, reason=FinishReason.LENGTH))


@asynccontextmanager
async def unread_stub(dispatcher: FakeDispatcher, slow_client_s: float) -> AsyncIterator[InferenceServiceStub]:
    """A client whose connection takes no more than the protocol's first 64 KiB unless it reads."""
    channel_options = [*CHANNEL_OPTIONS, ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_535)]
    async with (
        grpc_gateway(dispatcher, InferenceOptions(slow_client_s=slow_client_s)) as address,
        grpc.aio.insecure_channel(address, options=channel_options) as channel,
    ):
        yield InferenceServiceStub(channel)


async def test_a_client_that_reads_late_gets_everything_in_few_pieces():
    dispatcher = large(20_000)
    async with unread_stub(dispatcher, slow_client_s=30.0) as stub:
        call = stub.Generate(GenerateRequest(text="x", sampling={"logprobs": 5}))
        await call.read()
        generation = dispatcher.generations[0]
        await eventually(lambda: generation.num_events == 402)
        events = [event async for event in call_events(call)]
    assert len(ids_of(events)) == 20_000
    assert len(events) < 200


async def call_events(call: Any) -> AsyncIterator[GenerateResponse]:
    while (event := await call.read()) is not grpc.aio.EOF:
        yield event


async def test_a_client_that_does_not_read_is_cut():
    dispatcher = large(20_000)
    async with unread_stub(dispatcher, slow_client_s=0.6) as stub:
        call = stub.Generate(GenerateRequest(text="x", sampling={"logprobs": 5}))
        events = [await call.read()]
        while not ids_of(events):
            events.append(await call.read())
        await eventually(dispatcher.all_closed)
        events += [event async for event in call_events(call)]
    assert events[-1].error.code == error_pb2.ERROR_CODE_CANCELLED
    assert "0.6 s" in events[-1].error.message
    assert len(ids_of(events)) < 20_000


# -- the outbox -------------------------------------------------------------------------------------------------------


async def test_what_waits_is_joined_to_one_chunk_a_choice():
    outbox = Outbox()
    score = TokenLogprob(-1.0)
    outbox.put(TokenChunk(1, 4, (7,), "a", (score,)))
    outbox.put(TokenChunk(0, 4, (8,), "", ()))
    outbox.put(TokenChunk(1, 5, (9, 10), "bc", (score, score), FinishReason.STOP))
    outbox.close(Finished(Usage(1, 2)))
    assert await outbox.take() == TokenChunk(1, 4, (7, 9, 10), "abc", (score,) * 3, FinishReason.STOP)
    assert await outbox.take() == TokenChunk(0, 4, (8,), "")
    assert await outbox.take() == Finished(Usage(1, 2))
    assert await outbox.take() is None


async def test_an_error_comes_after_the_tokens_before_it():
    outbox = Outbox()
    error = InvalidRequestError("no")
    outbox.put(TokenChunk(0, 1, (7,), "a"))
    outbox.close(error)
    assert [type(await outbox.take()), await outbox.take(), await outbox.take()] == [TokenChunk, error, None]

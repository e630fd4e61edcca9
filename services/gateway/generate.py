"""The two routes that generate, from the body to the whole answer or its stream."""

import asyncio
import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from fastapi import Request, Response
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from services.gateway.answer import Answer, Origin
from services.gateway.caller import SESSION_HEADER, Trace, session_id_of
from services.gateway.choice import Delta, ScoredToken
from services.gateway.disconnect import unless_client_leaves
from services.gateway.explain import HEADER, header_value, is_asked
from services.gateway.generation import Dispatcher
from services.gateway.http_errors import BodyTimeoutError, BodyTooLargeError, ModelNotFoundError
from services.gateway.http_metrics import AnswerTimer, HttpMetrics
from services.gateway.openai_response import AnswerFormat, ChatFormat, CompletionFormat, Envelope
from services.gateway.outlet import Desk
from services.gateway.prepare import Job, RequestLimits, ServedModel, prepare_chat, prepare_completion
from services.gateway.schemas import ChatBody, CommonBody, CompletionBody, parse_body
from services.gateway.sse import EventStream, StreamOptions
from services.gateway.tokenizer import TokenizerPool
from tailrace.errors import CancelledByClientError
from tailrace.types import FinishReason


@dataclass(frozen=True, slots=True)
class HttpOptions:
    api_keys: tuple[str, ...] = ()
    """Empty: everyone may ask."""
    max_body_bytes: int = 16 << 20
    body_timeout_s: float = 60.0
    request_deadline_s: float = 600.0
    limits: RequestLimits = field(default_factory=RequestLimits)
    stream: StreamOptions = field(default_factory=StreamOptions)
    num_tokenizer_threads: int = 2


class Endpoints:
    def __init__(
        self, dispatcher: Dispatcher, model: ServedModel, options: HttpOptions, metrics: HttpMetrics, desk: Desk | None
    ) -> None:
        self._dispatcher = dispatcher
        self._model = model
        self._options = options
        self._metrics = metrics
        self._desk = desk
        self._tokenizers = TokenizerPool(num_threads=options.num_tokenizer_threads)

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, parse_body(CompletionBody, await read_body(request, self._options)))

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, parse_body(ChatBody, await read_body(request, self._options)))

    async def _answer(self, request: Request, body: CommonBody) -> Response:
        self._check_model(body)
        try:
            return await unless_client_leaves(request.receive, self._generate(request, body))
        except CancelledByClientError:
            self._metrics.disconnects.labels("left").inc()
            raise

    async def _generate(self, request: Request, body: CommonBody) -> Response:
        job = await self._tokenizers.run(lambda: self._prepare(body))
        envelope = _envelope(body)
        answer = self._new_answer(job, request)
        try:
            await answer.start(self._dispatcher, self._origin(request, envelope))
            headers = {HEADER: header_value(answer.explain())} if is_asked(request.headers.get(HEADER)) else {}
            if body.stream:
                return self._stream(answer, body, envelope, request, headers)
            result = await _Collector(answer).body(self._format(body, envelope))
        except BaseException:
            await answer.aclose()
            raise
        await answer.aclose()
        return Response(result, headers=headers, media_type="application/json")

    async def route(self, request: Request) -> Response:
        """A dry run, of a body for either endpoint: where it would go now, and why."""
        data = await read_body(request, self._options)
        body = parse_body(ChatBody if _has_messages(data) else CompletionBody, data)
        self._check_model(body)
        job = await self._tokenizers.run(lambda: self._prepare(body))
        described = self._new_answer(job, request).foresee(self._dispatcher, self._origin(request, _envelope(body)))
        return Response(json.dumps({"prompts": described}), media_type="application/json")

    def _prepare(self, body: CommonBody) -> Job:
        if isinstance(body, ChatBody):
            return prepare_chat(body, self._model, self._options.limits)
        assert isinstance(body, CompletionBody)
        return prepare_completion(body, self._model, self._options.limits)

    def _check_model(self, body: CommonBody) -> None:
        if body.model not in self._model.names:
            raise no_such_model(body.model, self._model)

    def _new_answer(self, job: Job, request: Request) -> Answer:
        timer = AnswerTimer(self._metrics, len(job.prompts) * job.num_choices, request.state.arrived_at)
        return Answer(job, self._model.tokenizer.vocabulary, timer)

    def _stream(
        self, answer: Answer, body: CommonBody, envelope: Envelope, request: Request, headers: Mapping[str, str]
    ) -> EventStream:
        return EventStream(
            answer,
            self._format(body, envelope),
            self._metrics,
            self._options.stream,
            self._desk,
            include_usage=body.includes_usage,
            request_id=request.state.request_id,
            headers=headers,
        )

    def _format(self, body: CommonBody, envelope: Envelope) -> AnswerFormat:
        kind = ChatFormat if isinstance(body, ChatBody) else CompletionFormat
        return kind(
            envelope,
            self._model.tokenizer.vocabulary,
            logprobs=body.num_logprobs is not None,
            include_usage=body.includes_usage,
        )

    def _origin(self, request: Request, envelope: Envelope) -> Origin:
        trace = Trace.of(request.headers.get("traceparent", ""), request.headers.get("tracestate", ""))
        return Origin(
            # Not the client's X-Request-Id, which two requests may share.
            request_id=envelope.id,
            deadline_s=self._options.request_deadline_s - (time.monotonic() - request.state.arrived_at),
            traceparent=trace.parent,
            tracestate=trace.state,
            session_id=session_id_of(request.headers.get(SESSION_HEADER, ""), SESSION_HEADER),
        )


def _envelope(body: CommonBody) -> Envelope:
    prefix = "chatcmpl" if isinstance(body, ChatBody) else "cmpl"
    return Envelope(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), body.model)


def no_such_model(name: str, model: ServedModel) -> ModelNotFoundError:
    served = ", ".join(model.names)
    return ModelNotFoundError(f"the model {name[:200]!r} does not exist here; served: {served}", param="model")


def _has_messages(data: bytes) -> bool:
    try:
        fields = from_json(data)
    except ValueError:
        return False
    return isinstance(fields, dict) and "messages" in fields


class _Collector:
    """A Reader that keeps everything to the end."""

    def __init__(self, answer: Answer) -> None:
        self._texts: list[list[str]] = [[] for _ in range(answer.num_choices)]
        self._tokens: list[list[ScoredToken]] = [[] for _ in range(answer.num_choices)]
        self._reasons: dict[int, FinishReason] = {}
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._answer = answer

    def take(self, index: int, delta: Delta, reason: FinishReason | None) -> None:
        self._texts[index].append(delta.text)
        self._tokens[index].extend(delta.tokens)
        if reason is not None:
            self._reasons[index] = reason

    def close(self, error: Exception | None) -> None:
        if self._end.done():
            return  # whoever waited has gone
        if error is not None:
            self._end.set_exception(error)
        else:
            self._end.set_result(None)

    async def body(self, answer_format: AnswerFormat) -> bytes:
        """Raises what the answer failed with."""
        self._answer.follow(self)
        await self._end
        texts = [Delta("".join(text), tokens) for text, tokens in zip(self._texts, self._tokens, strict=True)]
        return answer_format.body(texts, [self._reasons[index] for index in range(len(texts))], self._answer.usage)


async def read_body(request: Request, options: HttpOptions) -> bytes:
    """Raises BodyTooLargeError without having read more than the limit, BodyTimeoutError for a client that stalls."""
    limit = options.max_body_bytes
    too_large = BodyTooLargeError(f"the body has more than {limit} bytes, the limit")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(options.body_timeout_s):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise BodyTimeoutError(f"the body did not arrive within {options.body_timeout_s:g} s") from None
    except ClientDisconnect:
        raise CancelledByClientError("the client left before its body was read") from None
    return bytes(body)

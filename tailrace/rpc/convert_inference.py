"""The translator of the public API, apart from `convert` so that a client imports nothing of the cluster's inside."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from google.protobuf.message import Message

from tailrace import errors
from tailrace.errors import InvalidRequestError, TailraceError
from tailrace.inference import (
    ChatMessage,
    ChatPrompt,
    Event,
    Finished,
    GenerateRequest,
    Prompt,
    SamplingOptions,
    Started,
    TextPrompt,
    TokenChunk,
    TokenPrompt,
    Usage,
)
from tailrace.rpc.gen import error_pb2, generation_pb2
from tailrace.types import FinishReason, TokenLogprob

ERROR_TRAILER = "tailrace-error-bin"
"""Trailing metadata of a refused call: a serialized `tailrace.v1.Error`."""
_ERRORS: dict[int, type[TailraceError]] = {
    kind.code: kind
    for kind in (
        errors.InvalidRequestError,
        errors.UnauthenticatedError,
        errors.NotFoundError,
        errors.OverloadedError,
        errors.UnavailableError,
        errors.DeadlineExceededError,
        errors.CancelledByClientError,
        errors.WorkerLostError,
        errors.TransferError,
        errors.LayoutMismatchError,
        errors.InternalError,
    )
}
_TIMES = ("queue_s", "prefill_s", "transfer_s", "transfer_bytes", "transport", "decode_s", "ttft_s")


# -- errors -----------------------------------------------------------------------------------------------------------


def error_to_proto(error: TailraceError) -> error_pb2.Error:
    return error_pb2.Error(
        code=error_pb2.ErrorCode.ValueType(int(error.code)),
        retryable=error.retryable,
        retry_after_s=error.retry_after_s,
        message=error.message,
        param=error.param or "",
    )


def error_from_proto(message: error_pb2.Error) -> TailraceError:
    """An unknown code, from a newer gateway, is an internal error."""
    kind = _ERRORS.get(message.code, errors.InternalError)
    return kind(message.message, param=message.param or None, retry_after_s=message.retry_after_s)


def error_to_trailer(error: TailraceError) -> tuple[str, bytes]:
    return ERROR_TRAILER, error_to_proto(error).SerializeToString()


def error_from_trailers(trailers: Iterable[tuple[str, str | bytes]]) -> TailraceError | None:
    """None when no gateway of ours has put one there."""
    value = next((value for key, value in trailers if key == ERROR_TRAILER), None)
    return error_from_proto(error_pb2.Error.FromString(value)) if isinstance(value, bytes) else None


# -- requests ---------------------------------------------------------------------------------------------------------


def request_to_proto(request: GenerateRequest) -> generation_pb2.GenerateRequest:
    """Raises InvalidRequestError, naming the field, for a value that the wire has no room or type for."""
    message = generation_pb2.GenerateRequest()
    for name in ("model", "request_id", "priority", "deadline_s", "cache_salt", "session_id", "stop"):
        _put(message, name, getattr(request, name))
    for name in ("traceparent", "tracestate"):
        if value := getattr(request, name):
            _put(message.trace, name, value)
    for option in fields(SamplingOptions):
        if (value := getattr(request.sampling, option.name)) is not None:
            _put(message.sampling, option.name, value)
    _put_prompt(message, request.prompt)
    return message


def _put_prompt(message: generation_pb2.GenerateRequest, prompt: Prompt | None) -> None:
    match prompt:
        case TextPrompt(text):
            _put(message, "text", text, param="prompt")
        case TokenPrompt(ids):
            message.tokens.SetInParent()
            _put(message.tokens, "ids", ids, param="prompt")
        case ChatPrompt(messages):
            message.chat.SetInParent()
            for index, given in enumerate(messages):
                added = message.chat.messages.add()
                _put(added, "role", given.role, param=f"messages[{index}].role")
                _put(added, "content", given.content, param=f"messages[{index}].content")


def _put(message: Message, name: str, value: Any, *, param: str = "") -> None:
    try:
        if isinstance(value, Mapping):
            getattr(message, name).update(value)
        elif isinstance(value, str | bytes) or not isinstance(value, Iterable):
            setattr(message, name, value)
        else:
            getattr(message, name).extend(value)
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidRequestError(f"{param or name}: {error}", param=param or name) from None


def request_from_proto(message: generation_pb2.GenerateRequest) -> GenerateRequest:
    return GenerateRequest(
        prompt=_prompt(message),
        model=message.model,
        request_id=message.request_id,
        sampling=_sampling(message.sampling),
        stop=tuple(message.stop),
        priority=message.priority,
        deadline_s=message.deadline_s,
        traceparent=message.trace.traceparent,
        tracestate=message.trace.tracestate,
        cache_salt=message.cache_salt,
        session_id=message.session_id,
    )


def _prompt(message: generation_pb2.GenerateRequest) -> Prompt | None:
    match message.WhichOneof("prompt"):
        case "text":
            return TextPrompt(message.text)
        case "tokens":
            return TokenPrompt(tuple(message.tokens.ids))
        case "chat":
            return ChatPrompt(tuple(ChatMessage(m.role, m.content) for m in message.chat.messages))
    return None


def _sampling(message: generation_pb2.Sampling) -> SamplingOptions:
    return SamplingOptions(
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        temperature=message.temperature if message.HasField("temperature") else None,
        top_k=message.top_k,
        top_p=message.top_p if message.HasField("top_p") else None,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else None,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=dict(message.logit_bias),
        min_tokens=message.min_tokens,
        ignore_eos=message.ignore_eos,
        stop_token_ids=tuple(message.stop_token_ids),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        seed=message.seed if message.HasField("seed") else None,
        n=message.n or None,
    )


# -- events -----------------------------------------------------------------------------------------------------------


def event_to_proto(event: Event | TailraceError) -> generation_pb2.GenerateResponse:
    match event:
        case Started():
            started = generation_pb2.Started(
                request_id=event.request_id, num_prompt_tokens=event.num_prompt_tokens, seed=event.seed
            )
            return generation_pb2.GenerateResponse(started=started)
        case TokenChunk():
            return generation_pb2.GenerateResponse(tokens=_chunk_to_proto(event))
        case Finished():
            finished = generation_pb2.Finished(usage=_usage_to_proto(event.usage))
            return generation_pb2.GenerateResponse(finished=finished)
        case TailraceError():
            return generation_pb2.GenerateResponse(error=error_to_proto(event))


def _chunk_to_proto(chunk: TokenChunk) -> generation_pb2.Tokens:
    return generation_pb2.Tokens(
        choice=chunk.choice,
        position=chunk.position,
        ids=chunk.token_ids,
        text=chunk.text,
        logprobs=[
            generation_pb2.TokenLogprob(
                logprob=scores.logprob, top_ids=[i for i, _ in scores.top], top_logprobs=[p for _, p in scores.top]
            )
            for scores in chunk.logprobs
        ],
        finish_reason=generation_pb2.FinishReason.ValueType(int(chunk.finish_reason or 0)),
    )


def _usage_to_proto(usage: Usage) -> generation_pb2.Usage:
    return generation_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        cached_tokens_by_tier=dict(usage.cached_by_tier),
        timing=generation_pb2.Timing(**{name: getattr(usage, name) for name in _TIMES}),
    )


def event_from_proto(message: generation_pb2.GenerateResponse) -> Event | TailraceError | None:
    """None: an event of a kind that only a newer gateway knows."""
    match message.WhichOneof("event"):
        case "started":
            started = message.started
            return Started(started.request_id, started.num_prompt_tokens, started.seed)
        case "tokens":
            return _chunk_from_proto(message.tokens)
        case "finished":
            return Finished(_usage_from_proto(message.finished.usage))
        case "error":
            return error_from_proto(message.error)
    return None


def _chunk_from_proto(message: generation_pb2.Tokens) -> TokenChunk:
    return TokenChunk(
        choice=message.choice,
        position=message.position,
        token_ids=tuple(message.ids),
        text=message.text,
        logprobs=tuple(
            TokenLogprob(scores.logprob, tuple(zip(scores.top_ids, scores.top_logprobs, strict=True)))
            for scores in message.logprobs
        ),
        finish_reason=FinishReason(message.finish_reason) if message.finish_reason else None,
    )


def _usage_from_proto(message: generation_pb2.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        cached_tokens=message.cached_tokens,
        cached_by_tier=dict(message.cached_tokens_by_tier),
        **{name: getattr(message.timing, name) for name in _TIMES},
    )

"""Answers in OpenAI's shapes, whole and as chunks of a stream."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from services.gateway.choice import Delta, ScoredToken
from services.gateway.generation import Usage
from services.gateway.outlet import TextChunk
from services.gateway.vocabulary import Vocabulary
from tailrace.types import FinishReason

# JSON has no infinity; a token that cannot be drawn gets what OpenAI's API gives it.
_LEAST_LOGPROB = -9999.0
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every body and chunk of one answer says of itself."""

    id: str
    created: int
    """Unix time."""
    model: str


class AnswerFormat(Protocol):
    """Chat or completions."""

    def body(self, texts: Sequence[Delta], reasons: Sequence[FinishReason], usage: Usage) -> bytes: ...

    def opening(self, num_choices: int) -> bytes:
        """The chunks before the first text."""
        ...

    def chunks(self, index: int, delta: Delta, reason: FinishReason | None) -> bytes: ...

    def text_chunk(self, index: int) -> TextChunk | None:
        """Makes the chunks of a choice that have nothing but text; None when there is more to say of each token."""
        ...

    def usage_chunk(self, usage: Usage) -> bytes: ...


def dump(value: Any) -> str:
    """JSON in ASCII: some clients take U+2028 or U+0085 in a stream for the end of a line."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def describe_usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "tailrace": {
            "queue_ms": round(usage.queue_s * 1e3, 3),
            "prefill_ms": round(usage.prefill_s * 1e3, 3),
            "transfer_ms": round(usage.transfer_s * 1e3, 3),
            "decode_ms": round(usage.decode_s * 1e3, 3),
            "ttft_ms": round(usage.ttft_s * 1e3, 3),
            "transport": usage.transport or None,
            "transfer_bytes": usage.transfer_bytes,
            "cached_tokens_by_tier": dict(usage.cached_by_tier),
        },
    }


class _Chunks:
    """Chunks around a choice's JSON, whose constant parts are written once."""

    def __init__(self, envelope: Envelope, kind: str, text_field: str, end_field: str, *, include_usage: bool) -> None:
        """`text_field`: the JSON of a choice that holds its text, up to the text and after it, cut by one "%".

        `end_field`: what stands there when a choice ends.
        """
        head = {"id": envelope.id, "object": kind, "created": envelope.created, "model": envelope.model}
        self._before = f"data: {dump(head)[:-1]},"
        self._choice_before = f'{self._before}"choices":[{{"index":'
        self._choice_after = '}],"usage":null}\n\n' if include_usage else "}]}\n\n"
        self._text_field = text_field
        self._end_field = end_field
        self._text_chunks: dict[int, TextChunk] = {}
        """By index."""

    def text_chunk(self, index: int) -> TextChunk:
        if (chunk := self._text_chunks.get(index)) is None:
            before, after = self._text_field.split("%")
            rest = f'{after},"logprobs":null,"finish_reason":null{self._choice_after}'
            chunk = TextChunk(f"{self._choice_before}{index},{before}".encode(), rest.encode())
            self._text_chunks[index] = chunk
        return chunk

    def pieces(self, index: int, delta: Delta, scores: Any, reason: FinishReason | None) -> bytes:
        """The chunk of what became printable, with its scores unless they are None, and that of the end."""
        text = b""
        if scores is not None:
            text = self.choice(index, self._text_field.replace("%", dump(delta.text)), dump(scores), None)
        elif delta:
            text = self.text_chunk(index).of(delta.text)
        return text + self.choice(index, self._end_field, "null", reason) if reason else text

    def choice(self, index: int, content: str, logprobs: str, reason: FinishReason | None) -> bytes:
        finish = f'"{reason.openai}"' if reason else "null"
        rest = f'{index},{content},"logprobs":{logprobs},"finish_reason":{finish}'
        return f"{self._choice_before}{rest}{self._choice_after}".encode()

    def usage(self, usage: Usage) -> bytes:
        return f'{self._before}"choices":[],"usage":{dump(describe_usage(usage))}}}\n\n'.encode()


class ChatFormat:
    def __init__(self, envelope: Envelope, vocabulary: Vocabulary, *, logprobs: bool, include_usage: bool) -> None:
        self._envelope = envelope
        self._vocabulary = vocabulary
        self._logprobs = logprobs
        fields = '"delta":{"content":%}', '"delta":{}'
        self._chunks = _Chunks(envelope, "chat.completion.chunk", *fields, include_usage=include_usage)

    def body(self, texts: Sequence[Delta], reasons: Sequence[FinishReason], usage: Usage) -> bytes:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text.text, "refusal": None},
                "logprobs": self._scores(text.tokens) if self._logprobs else None,
                "finish_reason": reason.openai,
            }
            for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return _body(self._envelope, "chat.completion", choices, usage)

    def opening(self, num_choices: int) -> bytes:
        content = '"delta":{"role":"assistant","content":""}'
        return b"".join(self._chunks.choice(index, content, "null", None) for index in range(num_choices))

    def chunks(self, index: int, delta: Delta, reason: FinishReason | None) -> bytes:
        scores = self._scores(delta.tokens) if self._logprobs and delta else None
        return self._chunks.pieces(index, delta, scores, reason)

    def text_chunk(self, index: int) -> TextChunk | None:
        return None if self._logprobs else self._chunks.text_chunk(index)

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._chunks.usage(usage)

    def _scores(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        content = [
            self._score(token.token_id, token.scores.logprob)
            | {"top_logprobs": [self._score(token_id, logprob) for token_id, logprob in token.scores.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _score(self, token_id: int, logprob: float) -> dict[str, Any]:
        token = self._vocabulary[token_id]
        return {"token": _name(token), "logprob": max(logprob, _LEAST_LOGPROB), "bytes": list(token)}


class CompletionFormat:
    def __init__(self, envelope: Envelope, vocabulary: Vocabulary, *, logprobs: bool, include_usage: bool) -> None:
        self._envelope = envelope
        self._vocabulary = vocabulary
        self._logprobs = logprobs
        self._chunks = _Chunks(envelope, "text_completion", '"text":%', '"text":""', include_usage=include_usage)

    def body(self, texts: Sequence[Delta], reasons: Sequence[FinishReason], usage: Usage) -> bytes:
        choices = [
            {
                "index": index,
                "text": text.text,
                "logprobs": self._scores(text.tokens) if self._logprobs else None,
                "finish_reason": reason.openai,
            }
            for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return _body(self._envelope, "text_completion", choices, usage)

    def opening(self, num_choices: int) -> bytes:
        return b""

    def chunks(self, index: int, delta: Delta, reason: FinishReason | None) -> bytes:
        scores = self._scores(delta.tokens) if self._logprobs and delta.tokens else None
        return self._chunks.pieces(index, delta, scores, reason)

    def text_chunk(self, index: int) -> TextChunk | None:
        return None if self._logprobs else self._chunks.text_chunk(index)

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._chunks.usage(usage)

    def _scores(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        return {
            "tokens": [self._token(token.token_id) for token in tokens],
            "token_logprobs": [max(token.scores.logprob, _LEAST_LOGPROB) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _top(self, token: ScoredToken) -> dict[str, float]:
        """The most likely tokens, and the chosen one if it is not among them."""
        pairs = [*token.scores.top, (token.token_id, token.scores.logprob)]
        return {self._token(token_id): max(logprob, _LEAST_LOGPROB) for token_id, logprob in pairs}

    def _token(self, token_id: int) -> str:
        name = _name(token := self._vocabulary[token_id])
        return name if _is_text(token) else f"bytes:{name}"


def _body(envelope: Envelope, kind: str, choices: list[dict[str, Any]], usage: Usage) -> bytes:
    head = {"id": envelope.id, "object": kind, "created": envelope.created, "model": envelope.model}
    return dump({**head, "choices": choices, "usage": describe_usage(usage)}).encode()


def _is_text(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


def _name(token: bytes) -> str:
    r"""The token's text, or its bytes as \xe2\x82 when it is a part of a character."""
    return token.decode() if _is_text(token) else "".join(f"\\x{byte:02x}" for byte in token)

"""From what a caller writes to a request. Only its shape is judged here; the gateway judges the rest."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from operator import index
from typing import Any, TypeAlias, TypedDict

from tailrace.errors import ConfigError, InvalidRequestError
from tailrace.inference import (
    ChatMessage,
    ChatPrompt,
    GenerateRequest,
    Prompt,
    SamplingOptions,
    TextPrompt,
    TokenPrompt,
)

PromptLike: TypeAlias = str | Sequence[int] | Sequence[ChatMessage | Mapping[str, str]]
"""A text, token ids, or chat messages, each a ChatMessage or an object with `role` and `content`."""
_SAMPLING = frozenset(option.name for option in fields(SamplingOptions))
_SEQUENCES = frozenset({"stop", "stop_token_ids"})


class GenerateOptions(TypedDict, total=False):
    """Keywords of `generate` and `complete`. Meanings and defaults are those of the OpenAI and vLLM APIs."""

    model: str
    request_id: str
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    min_tokens: int
    ignore_eos: bool
    stop_token_ids: Sequence[int]
    logprobs: int
    seed: int
    n: int
    stop: str | Sequence[str]
    priority: int
    timeout_s: float
    """For the whole request, in the gateway as well; overrides the client's."""
    traceparent: str
    tracestate: str
    cache_salt: str
    session_id: str


def make_request(prompt: PromptLike, options: GenerateOptions, timeout_s: float | None) -> GenerateRequest:
    """Raises InvalidRequestError, naming the field; TypeError for a keyword that nobody knows."""
    given: dict[str, Any] = {"timeout_s": timeout_s, **options}
    if unknown := given.keys() - GenerateOptions.__annotations__.keys():
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
    values = {name: _plain(name, value) for name, value in given.items() if value is not None}
    deadline_s = values.pop("timeout_s", 0.0)
    if "timeout_s" in given and given["timeout_s"] is not None and not deadline_s > 0:
        raise InvalidRequestError(f"timeout_s: must be more than 0, not {deadline_s}", param="timeout_s")
    sampling = SamplingOptions(**{name: values.pop(name) for name in _SAMPLING & values.keys()})
    return GenerateRequest(_prompt(prompt), sampling=sampling, deadline_s=deadline_s, **values)


def _plain(name: str, value: Any) -> Any:
    if name == "stop" and isinstance(value, str):
        return (value,)
    if name not in _SEQUENCES:
        return value
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise InvalidRequestError(f"{name}: a list is needed, not {type(value).__name__}", param=name)
    return tuple(value)


def _prompt(prompt: Any) -> Prompt:
    if isinstance(prompt, str):
        return TextPrompt(prompt)
    if isinstance(prompt, bytes | Mapping) or not hasattr(prompt, "__iter__"):
        kind = type(prompt).__name__
        raise InvalidRequestError(f"prompt: a text, token ids or messages are needed, not {kind}", param="prompt")
    items = list(prompt)
    if items and isinstance(items[0], ChatMessage | Mapping):
        return ChatPrompt(tuple(_message(number, item) for number, item in enumerate(items)))
    try:
        return TokenPrompt(tuple(map(index, items)))
    except TypeError:
        raise InvalidRequestError("prompt: token ids must be integers", param="prompt") from None


def _message(number: int, item: Any) -> ChatMessage:
    if isinstance(item, ChatMessage):
        return item
    if not isinstance(item, Mapping) or item.keys() != {"role", "content"}:
        message = f"messages[{number}]: an object with role and content, and nothing else, is needed"
        raise InvalidRequestError(message, param=f"messages[{number}]")
    return ChatMessage(item["role"], item["content"])


def checked_address(address: str) -> str:
    """Raises ConfigError: without a port gRPC would try 443, and tell of that in its own words."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"address: host:port is needed, not {address!r}", param="address")
    return address

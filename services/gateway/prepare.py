"""From a body to a job: prompts as tokens, sampling as the workers know it, every number checked against the model.

All functions are synchronous and know no network; the app runs them off the event loop, because they tokenize.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from services.gateway.detokenizer import decode
from services.gateway.http_errors import ContextLengthError
from services.gateway.schemas import ChatBody, ChatMessage, CommonBody, CompletionBody, ToolCall
from services.gateway.tokenizer import Tokenizer
from tailrace.errors import InvalidRequestError
from tailrace.types import SamplingParams

_COMPLETION_TOKENS = 16
_MAX_NORMALIZATION = 4
"""No normalizer in use makes a text shorter by more than this factor (NFC: 3)."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the edge knows of the model. The first of `names` is the canonical one."""

    names: tuple[str, ...]
    tokenizer: Tokenizer
    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    created: int
    """Unix time."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    max_choices_per_prompt: int = 128
    max_choices: int = 1024
    """Of all prompts of one request together."""


@dataclass(frozen=True, slots=True)
class Prompt:
    tokens: list[int]
    max_tokens: int
    echo: str = ""
    """Put before the answer's text."""


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request. Choice c of prompt p has the index p * num_choices + c in the answer."""

    model: str
    prompts: tuple[Prompt, ...]
    sampling: SamplingParams
    """`max_tokens` is each prompt's own."""
    num_choices: int
    stops: tuple[str, ...]
    include_stop: bool
    skip_special: bool
    end_ids: frozenset[int]
    """A token that ends a choice and is not part of its text."""
    continues_prompt: bool
    """The answer's text goes on where the prompt's ends, rather than being a text of its own."""
    priority: int = 0
    cache_salt: str = ""

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.tokens) for prompt in self.prompts)


def prepare_completion(body: CompletionBody, model: ServedModel, limits: RequestLimits) -> Job:
    """Raises InvalidRequestError, its param being the field at fault."""
    given = _prompts(body.prompt)
    _check_choices(body, len(given), limits)
    prompts = [_completion_prompt(prompt, body, model) for prompt in given]
    return _job(body, model, prompts, continues_prompt=True)


def prepare_chat(body: ChatBody, model: ServedModel, limits: RequestLimits) -> Job:
    """Raises InvalidRequestError, its param being the field at fault."""
    _check_choices(body, 1, limits)
    messages = [_message(index, message) for index, message in enumerate(body.messages)]
    _check_text(sum(len(message["content"]) for message in messages), model, "messages")
    tokens = model.tokenizer.encode_chat(messages, body.chat_template_kwargs)
    prompt = Prompt(tokens, _room(tokens, body, model, model.max_model_len, "messages"))
    return _job(body, model, [prompt], continues_prompt=False)


def _job(body: CommonBody, model: ServedModel, prompts: Sequence[Prompt], *, continues_prompt: bool) -> Job:
    sampling = _sampling(body, model)
    eos_ids = frozenset() if sampling.ignore_eos else model.eos_token_ids
    return Job(
        model=body.model,
        prompts=tuple(prompts),
        sampling=sampling,
        num_choices=body.num_choices,
        stops=tuple(body.stops),
        include_stop=bool(body.include_stop_str_in_output),
        skip_special=body.skip_special_tokens is not False,
        end_ids=eos_ids | frozenset(sampling.stop_token_ids),
        continues_prompt=continues_prompt,
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
    )


def _sampling(body: CommonBody, model: ServedModel) -> SamplingParams:
    biases: dict[int, float] = body.logit_bias or {}
    _check_ids(list(biases), model, "logit_bias")
    _check_ids(body.stop_token_ids or [], model, "stop_token_ids")
    return SamplingParams(
        temperature=_default(body.temperature, 1.0),
        top_k=min(max(0, body.top_k or 0), model.vocab_size),
        top_p=_default(body.top_p, 1.0),
        min_p=body.min_p or 0.0,
        repetition_penalty=_default(body.repetition_penalty, 1.0),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=tuple(biases.items()),
        min_tokens=body.min_tokens or 0,
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logprobs=body.num_logprobs,
        seed=secrets.randbits(64) if body.seed is None else body.seed % 2**64,
    )


def _default(value: float | None, default: float) -> float:
    return default if value is None else value


def _check_choices(body: CommonBody, num_prompts: int, limits: RequestLimits) -> None:
    if body.num_choices > limits.max_choices_per_prompt:
        raise InvalidRequestError(f"n must be at most {limits.max_choices_per_prompt}", param="n")
    if num_prompts * body.num_choices > limits.max_choices:
        message = f"{num_prompts} prompts of {body.num_choices} choices are too many; at most {limits.max_choices}"
        raise InvalidRequestError(f"{message} choices are allowed in one request", param="prompt")


def _check_ids(ids: Sequence[int], model: ServedModel, param: str) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < model.vocab_size):
        message = f"{param}: token ids must be from 0 to {model.vocab_size - 1}, the model's vocabulary"
        raise InvalidRequestError(message, param=param)


def _check_text(num_characters: int, model: ServedModel, param: str) -> None:
    """Refuses a text that cannot fit into the context, without the work of tokenizing it."""
    fewest = num_characters // (_MAX_NORMALIZATION * model.tokenizer.max_token_bytes)
    if fewest > model.max_model_len:
        raise _too_long(f"more than {fewest}", model, param)


def _too_long(num_tokens: str, model: ServedModel, param: str) -> ContextLengthError:
    message = f"the prompt has {num_tokens} tokens; prompt and answer together may have {model.max_model_len}"
    return ContextLengthError(message, param=param)


def _room(tokens: Sequence[int], body: CommonBody, model: ServedModel, default: int, param: str) -> int:
    """How many tokens the answer may have. Raises when what was asked for does not fit into the context."""
    room = model.max_model_len - len(tokens)
    if room < 1:
        raise _too_long(str(len(tokens)), model, param)
    name, asked = body.token_limit
    if asked is not None and asked > room:
        message = f"{name} is {asked} and the prompt has {len(tokens)} tokens"
        raise ContextLengthError(f"{message}; together they may be {model.max_model_len}", param=name)
    limit = min(default, room) if asked is None else asked
    if (body.min_tokens or 0) > limit:
        raise InvalidRequestError(f"min_tokens must be at most max_tokens, which is {limit}", param="min_tokens")
    return limit


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """The four shapes of `prompt`, as a list of prompts of one kind."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if _are_ids(value):
            return [value]
        if all(isinstance(item, list) and _are_ids(item) for item in value):
            return value
    message = "prompt must be a string, a list of strings, a list of token ids or a list of such lists, not empty"
    raise InvalidRequestError(message, param="prompt")


def _are_ids(items: list[Any]) -> bool:
    return all(type(item) is int for item in items)


def _completion_prompt(prompt: str | list[int], body: CompletionBody, model: ServedModel) -> Prompt:
    if not prompt:
        raise InvalidRequestError("prompt is empty", param="prompt")
    if isinstance(prompt, str):
        _check_text(len(prompt), model, "prompt")
        tokens = model.tokenizer.encode(prompt)
    else:
        _check_ids(prompt, model, "prompt")
        tokens = prompt
    max_tokens = _room(tokens, body, model, _COMPLETION_TOKENS, "prompt")
    return Prompt(tokens, max_tokens, _text(prompt, model) if body.echo else "")


def _text(prompt: str | list[int], model: ServedModel) -> str:
    return prompt if isinstance(prompt, str) else decode(model.tokenizer.vocabulary, prompt)


def _message(index: int, message: ChatMessage) -> dict[str, Any]:
    """As templates know it: they have no role "developer", and tool arguments are objects."""
    if message.content is None and message.role != "assistant":
        raise InvalidRequestError(f"messages[{index}].content is missing", param=f"messages[{index}].content")
    role = "system" if message.role == "developer" else message.role
    result: dict[str, Any] = {"role": role, "content": message.content or ""}
    if message.tool_calls:
        result["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    return result | {key: value for key in ("name", "tool_call_id") if (value := getattr(message, key)) is not None}


def _tool_call(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = from_json(call.function.arguments)
    except ValueError:
        arguments = call.function.arguments
    return {"id": call.id, "type": call.type, "function": {"name": call.function.name, "arguments": arguments}}

"""Bodies of the OpenAI API, with vLLM's extensions.

Types are strict (no number from a string or a boolean), unknown fields are accepted, null means "not given". What needs
the model to be judged (token ids, lengths) is judged in prepare.py.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from tailrace.errors import InvalidRequestError
from tailrace.kv.hashing import MAX_SALT_LENGTH

_MAX_STOPS = 16
_MAX_STOP_LENGTH = 1024
_MAX_BIASES = 1024
_MAX_STOP_IDS = 1024

_Body = TypeVar("_Body", bound="CommonBody")


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("value", "{message}", {"message": message})


def _stops(value: Any) -> list[str]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise _wrong("must be a string or a list of strings")
    if len(stops) > _MAX_STOPS:
        raise _wrong(f"has {len(stops)} strings; at most {_MAX_STOPS} are allowed")
    if not all(0 < len(stop) <= _MAX_STOP_LENGTH for stop in stops):
        raise _wrong(f"each string must have 1 to {_MAX_STOP_LENGTH} characters")
    return stops


def _biases(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong("must be an object of token ids and numbers")
    if len(value) > _MAX_BIASES:
        raise _wrong(f"has {len(value)} entries; at most {_MAX_BIASES} are allowed")
    return dict(_bias(key, bias) for key, bias in value.items())


def _bias(key: str, bias: Any) -> tuple[int, float]:
    if not (key.isascii() and key.isdecimal() and len(key) < 10):
        raise _wrong(f"keys must be token ids, not {key[:40]!r}")
    if type(bias) not in (int, float) or not -100 <= bias <= 100:
        raise _wrong(f"the bias of token {key} must be a number from -100 to 100")
    return int(key), float(bias)


def _content(value: Any) -> str | None:
    """A string, or parts of type text, which are joined by line breaks."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _wrong("must be a string or a list of content parts")
    return "\n".join(map(_part, value))


def _part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise _wrong("each content part must be an object with a type")
    if kind not in ("text", "refusal"):
        raise _wrong(f"parts of type {kind[:40]!r} are not supported by this model; only 'text' is")
    if not isinstance(part.get(kind), str):
        raise _wrong(f"a part of type {kind!r} must have a string {kind!r}")
    return str(part[kind])


class _Lenient(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class StreamOptions(_Lenient):
    include_usage: bool | None = None


class CommonBody(_Lenient):
    """What completions and chat have in common."""

    model: str
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[Any, AfterValidator(_biases)] = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Annotated[Any, AfterValidator(_stops)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # vLLM's extensions
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=_MAX_STOP_IDS, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: Annotated[str, Field(max_length=MAX_SALT_LENGTH)] | None = None
    # They would change the answer, so they are refused rather than ignored.
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    structured_outputs: Any = None
    response_format: Any = None

    @property
    def stops(self) -> list[str]:
        return self.stop or []

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def num_logprobs(self) -> int | None:
        """None: not asked for; k: of the chosen token and the k most likely ones."""
        raise NotImplementedError

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """The field that limits the answer's tokens, and what it says."""
        return "max_tokens", self.max_tokens

    def check(self) -> None:
        """Raises InvalidRequestError for what types cannot say: fields that need one another, or nobody here has."""
        for name, value in self.unsupported().items():
            # Empty lists, objects and strings ask for nothing.
            if value is not None and value not in ([], {}, ""):
                raise InvalidRequestError(f"{name} is not supported", param=name.split()[0])
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options is allowed only with stream: true", param="stream_options")

    def unsupported(self) -> Mapping[str, Any]:
        """Fields that are refused when they say anything."""
        names = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs")
        format_is_plain = isinstance(self.response_format, dict) and self.response_format.get("type") == "text"
        return {name: getattr(self, name) for name in names} | {
            "response_format": None if format_is_plain else self.response_format
        }


class CompletionBody(CommonBody):
    prompt: Any = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    suffix: str | None = None
    best_of: int | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def unsupported(self) -> Mapping[str, Any]:
        best_of = self.best_of if self.best_of not in (None, self.num_choices) else None
        logprobs = self.logprobs if self.echo else None
        return {**super().unsupported(), "suffix": self.suffix, "best_of": best_of, "logprobs with echo": logprobs}


class FunctionCall(_Lenient):
    name: str
    arguments: str


class ToolCall(_Lenient):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(_Lenient):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Any, AfterValidator(_content)] = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None


class ChatBody(CommonBody):
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Any = None
    functions: Any = None
    tool_choice: Any = None
    function_call: Any = None
    audio: Any = None
    modalities: Any = None
    web_search_options: Any = None

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def token_limit(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super().token_limit

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("top_logprobs is allowed only with logprobs: true", param="top_logprobs")

    def unsupported(self) -> Mapping[str, Any]:
        names = ("tools", "functions", "audio", "web_search_options")
        return {
            **super().unsupported(),
            **{name: getattr(self, name) for name in names},
            "tool_choice": None if self.tool_choice in ("none", "auto") else self.tool_choice,
            "function_call": None if self.function_call in ("none", "auto") else self.function_call,
            "modalities": None if self.modalities == ["text"] else self.modalities,
        }


def parse_body(kind: type[_Body], body: bytes) -> _Body:
    """Raises InvalidRequestError; its param is the path of the first wrong field, as in `messages[0].role`."""
    try:
        parsed = kind.model_validate_json(body)
    except ValidationError as error:
        raise _first_error(error) from None
    parsed.check()
    return parsed


def _first_error(error: ValidationError) -> InvalidRequestError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    return InvalidRequestError(f"{path}: {first['msg']}" if path else first["msg"], param=path or None)

"""What a client asks of a gateway over gRPC and what it is told, as plain values for both ends.

`tailrace.rpc.convert_inference` puts them on the wire and takes them off.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tailrace.types import FinishReason, TokenLogprob


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class TextPrompt:
    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Rendered by the model's own chat template, which also opens the answer."""

    messages: tuple[ChatMessage, ...]


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How tokens are to be drawn, as far as the client says. None: not said, the gateway's default holds."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: tuple[int, ...] | None = None
    logprobs: int | None = None
    """k: the log-probabilities of every token and of the k most likely ones in its place."""
    seed: int | None = None
    n: int | None = None
    """Number of choices."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Nothing in it has been checked yet; the gateway does that."""

    prompt: Prompt | None
    model: str = ""
    """Empty: the model that the gateway serves."""
    request_id: str = ""
    """For the caller's own logs. Empty: the gateway draws one."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stop: tuple[str, ...] = ()
    priority: int = 0
    """Lower runs first."""
    deadline_s: float = 0.0
    """Seconds for the whole request; 0: the gateway's default."""
    traceparent: str = ""
    tracestate: str = ""
    cache_salt: str = ""
    """Requests with different salts never share cached blocks."""
    session_id: str = ""
    """The conversation that it belongs to, at most 256 characters: where prices tie, it goes where the last one ran."""


@dataclass(frozen=True, slots=True)
class Started:
    """The request was accepted. What goes wrong from here on ends the stream with an error."""

    request_id: str
    num_prompt_tokens: int
    seed: int
    """The one that was used, whoever chose it."""


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """New tokens of one choice, and the text that became printable with them.

    Chunks of a choice come in order, each token once. Text may lag behind tokens: a character is never split, and what
    may become a stop string is held back. End-of-sequence and stop tokens are among the ids and not in the text.
    """

    choice: int
    position: int
    """Of the first id in the sequence; the prompt starts at 0."""
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    """One an id when they were asked for."""
    finish_reason: FinishReason | None = None
    """Set on the last chunk of the choice, which may have no ids."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Where one request's tokens and time went. Legs overlap, so the seconds need not add up."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Prompt tokens whose KV was not computed for this request."""
    queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    transfer_bytes: int = 0
    transport: str = ""
    """"nixl", "stream" or "local"; empty when nothing was transferred."""
    decode_s: float = 0.0
    ttft_s: float = 0.0
    """As the gateway saw it."""
    cached_by_tier: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finished:
    """All choices have ended; the last event."""

    usage: Usage


Event = Started | TokenChunk | Finished

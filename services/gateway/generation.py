"""What the HTTP edge asks of the rest of the gateway, and the events that it gets back."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

from tailrace.types import FinishReason, SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A validated request. `sampling.seed` is always set; `deadline_s` is what is left when it is submitted."""

    request_id: str
    prompt_tokens: list[int]
    sampling: SamplingParams
    num_choices: int = 1
    priority: int = 0
    deadline_s: float = 600.0
    cache_salt: str = ""
    traceparent: str = ""
    tracestate: str = ""


@dataclass(frozen=True, slots=True)
class TokensEvent:
    """New tokens of one choice, in order and each once. `position` is that of the first; the prompt starts at 0."""

    choice: int
    position: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    """One a token when log-probabilities were asked for."""


@dataclass(frozen=True, slots=True)
class ChoiceEvent:
    """A choice ended; no tokens of it follow. An end-of-sequence or stop token is among the tokens before it."""

    choice: int
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Usage:
    """Where one request's tokens and time went. Legs overlap, so the seconds need not add up."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    transfer_bytes: int = 0
    transport: str = ""
    """"nixl", "stream" or "local"; empty when nothing was transferred."""
    decode_s: float = 0.0
    ttft_s: float = 0.0
    cached_by_tier: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class UsageEvent:
    """The last event of a request that did not fail."""

    usage: Usage


GenerationEvent = TokensEvent | ChoiceEvent | UsageEvent


class Generation(Protocol):
    """One request being answered."""

    def __aiter__(self) -> AsyncIterator[GenerationEvent]:
        """Events until the UsageEvent. Raises TailraceError for a terminal error. Iterated once, by one task."""
        ...

    def finish_choice(self, choice: int) -> None:
        """A stop string was found: what is left of this choice is cancelled and not delivered."""
        ...

    async def aclose(self) -> None:
        """Cancels what still runs. Idempotent; safe at any moment and while another task iterates."""
        ...


class Dispatcher(Protocol):
    async def submit(self, request: GenerationRequest) -> Generation:
        """Raises OverloadedError, UnavailableError or InvalidRequestError before anything is accepted.

        When it is cancelled or raises, nothing is left running.
        """
        ...

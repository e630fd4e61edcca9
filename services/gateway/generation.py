"""What the edges ask of the rest of the gateway, and how they are told what comes of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from services.gateway.outlet import Outlet
from tailrace.policy.routing import Route
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
    session_id: str = ""
    """Of the conversation that it belongs to; empty: of none that the client has named."""
    traceparent: str = ""
    tracestate: str = ""


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


class Listener(Protocol):
    """Who hears what comes of one request. Called on the event loop, within a worker's message: returns soon."""

    def on_tokens(
        self, choice: int, position: int, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] | None
    ) -> None:
        """New tokens of one choice, in order and each once. `position` is that of the first; the prompt starts at 0.

        `logprobs`: one a token when they were asked for.
        """
        ...

    def on_choice_ended(self, choice: int, reason: FinishReason) -> None:
        """No tokens of it follow. An end-of-sequence or stop token was among the tokens before."""
        ...

    def on_finished(self, usage: Usage) -> None:
        """Every choice has ended; nothing follows."""
        ...

    def on_failed(self, error: Exception) -> None:
        """The terminal error; nothing follows."""
        ...


class Generation(Protocol):
    """One request being answered."""

    route: Route | None
    """The first one, until somebody listens: it keeps what every worker was priced at, and a request may live long."""

    def listen(self, listener: Listener) -> None:
        """What has come so far is told before this returns, the rest as it comes. Called once."""
        ...

    def divert(self, choice: int, outlet: Outlet) -> None:
        """The short way: the outlet is asked first for the tokens of this choice, each in its place.

        The listener is told of those that it does not take, and of everything else, as before.
        """
        ...

    def finish_choice(self, choice: int) -> None:
        """A stop string was found: what is left of this choice is cancelled and not told.

        If it was the last one, the listener hears of the end before this returns.
        """
        ...

    async def aclose(self) -> None:
        """Cancels what still runs; the listener hears nothing more. Idempotent, safe at any moment."""
        ...


class Dispatcher(Protocol):
    async def submit(self, request: GenerationRequest) -> Generation:
        """Raises OverloadedError, UnavailableError or InvalidRequestError before anything is accepted.

        When it is cancelled or raises, nothing is left running.
        """
        ...

    def route(self, request: GenerationRequest) -> Route:
        """Where it would go now; nothing is accepted. Raises UnavailableError or InvalidRequestError."""
        ...

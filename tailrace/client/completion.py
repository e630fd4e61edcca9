"""A whole answer, put together from its events."""

from dataclasses import dataclass, field

from tailrace.errors import UnavailableError
from tailrace.inference import Event, Finished, Started, TokenChunk, Usage
from tailrace.types import FinishReason, TokenLogprob


@dataclass(frozen=True, slots=True)
class CompletedChoice:
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()
    """One a token when they were asked for."""


@dataclass(frozen=True, slots=True)
class Completion:
    """`text`, `token_ids` and `finish_reason` are those of the first choice, which is the only one unless n > 1."""

    request_id: str
    seed: int
    choices: tuple[CompletedChoice, ...]
    usage: Usage

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.choices[0].finish_reason


@dataclass(slots=True)
class _Parts:
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: FinishReason | None = None

    def choice(self) -> CompletedChoice:
        if self.reason is None:
            raise UnavailableError("a choice was not ended")
        return CompletedChoice("".join(self.texts), tuple(self.token_ids), self.reason, tuple(self.logprobs))


class Collector:
    """Takes all events of one request."""

    def __init__(self) -> None:
        self._started: Started | None = None
        self._usage: Usage | None = None
        self._parts: dict[int, _Parts] = {}

    def add(self, event: Event) -> None:
        match event:
            case Started():
                self._started = event
            case TokenChunk():
                parts = self._parts.setdefault(event.choice, _Parts())
                parts.texts.append(event.text)
                parts.token_ids.extend(event.token_ids)
                parts.logprobs.extend(event.logprobs)
                parts.reason = event.finish_reason
            case Finished():
                self._usage = event.usage

    def completion(self) -> Completion:
        """Raises UnavailableError when something is missing."""
        if self._started is None or self._usage is None or not self._parts:
            raise UnavailableError("the answer is not whole")
        choices = tuple(self._parts[index].choice() for index in sorted(self._parts))
        return Completion(self._started.request_id, self._started.seed, choices, self._usage)

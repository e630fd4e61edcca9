"""A dispatcher without workers: answers what it was told to, and remembers what was done to it."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from services.gateway.generation import GenerationRequest, Listener, Usage
from services.gateway.outlet import Outlet
from tailrace.errors import TailraceError
from tailrace.policy.routing import CostTerms, Route
from tailrace.types import FinishReason, TokenLogprob

Telling = tuple[int | None, Callable[[Listener], None]]
"""(its choice; None: of the whole request, what to tell)"""


@dataclass
class Script:
    """What one request is answered with. Lists are one a choice; the last one serves the choices beyond."""

    token_ids: Sequence[Sequence[int]]
    reason: FinishReason = FinishReason.STOP
    tokens_per_event: int = 1
    delay_s: float = 0.0
    fail_at: int | None = None
    """Fail with `error` instead of the event of this number."""
    error: Exception = field(default_factory=lambda: TailraceError("secret detail"))
    hang_at: int | None = None
    """Wait for ever instead of the event of this number."""
    hold_at: int | None = None
    """Wait for `go_on` before the event of this number."""
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    usage: Usage = field(default_factory=lambda: Usage(prompt_tokens=0, completion_tokens=0))


TERMS = tuple(CostTerms(f"d{d}", f"p{p}", 0.1 * p, 0.25, 0.01, 0.1 - 0.01 * d) for p in (0, 1) for d in (0, 1))
ROUTE = Route(TERMS[1], lambda: TERMS)


class FakeGeneration:
    def __init__(self, request: GenerationRequest, script: Script) -> None:
        self.request = request
        self.route: Route | None = ROUTE
        self.finished: list[int] = []
        self.outlets: dict[int, Outlet] = {}
        self.num_events = 0
        self.closed = asyncio.Event()
        self._script = script
        self._speaker: asyncio.Task[None] | None = None

    def listen(self, listener: Listener) -> None:
        assert self._speaker is None
        self._speaker = asyncio.create_task(self._speak(listener))

    async def _speak(self, listener: Listener) -> None:
        for number, (choice, tell) in enumerate(self._tellings()):
            if choice in self.finished:
                continue
            await asyncio.sleep(self._script.delay_s)
            if number == self._script.fail_at:
                return listener.on_failed(self._script.error)
            if number == self._script.hang_at:
                await asyncio.Event().wait()
            if number == self._script.hold_at:
                await self._script.go_on.wait()
            assert not self.closed.is_set()
            self.num_events += 1
            tell(listener)

    def _tellings(self) -> list[Telling]:
        tellings: list[Telling] = []
        step, start = self._script.tokens_per_event, len(self.request.prompt_tokens)
        ids = [self._ids(choice) for choice in range(self.request.num_choices)]
        for at in range(0, max(map(len, ids)), step):
            for choice, tokens in enumerate(ids):
                if part := tokens[at : at + step]:
                    tellings.append((choice, partial(self._tokens, choice, start + at, part, self._logprobs(part))))
        for choice in range(self.request.num_choices):
            tellings.append((choice, partial(_end, choice, self._script.reason)))
        return [*tellings, (None, lambda listener: listener.on_finished(self._script.usage))]

    def _ids(self, choice: int) -> list[int]:
        lists = self._script.token_ids
        return list(lists[min(choice, len(lists) - 1)])

    def _logprobs(self, tokens: list[int]) -> list[TokenLogprob] | None:
        count = self.request.sampling.logprobs
        if count is None:
            return None
        return [TokenLogprob(-0.5, tuple((token + i, -0.5 - i) for i in range(count))) for token in tokens]

    def divert(self, choice: int, outlet: Outlet) -> None:
        self.outlets[choice] = outlet

    def _tokens(
        self, choice: int, position: int, ids: list[int], logprobs: list[TokenLogprob] | None, listener: Listener
    ) -> None:
        outlet = self.outlets.get(choice)
        if outlet is not None and len(ids) == 1 and outlet.take(position, ids[0]):
            return
        if outlet is not None:
            outlet.collect()
            outlet.expect(position + len(ids))
        listener.on_tokens(choice, position, ids, logprobs)

    def finish_choice(self, choice: int) -> None:
        self.finished.append(choice)

    async def aclose(self) -> None:
        self.closed.set()
        if self._speaker is not None:
            self._speaker.cancel()


def _end(choice: int, reason: FinishReason, listener: Listener) -> None:
    listener.on_choice_ended(choice, reason)


class FakeDispatcher:
    def __init__(self, script: Script | Callable[[GenerationRequest], Script]) -> None:
        self.script = script
        self.refusal: TailraceError | None = None
        self.accepts = 0
        """How many requests are taken before `refusal` is raised."""
        self.generations: list[FakeGeneration] = []
        self.routed: list[GenerationRequest] = []
        """Dry runs."""

    @property
    def requests(self) -> list[GenerationRequest]:
        return [generation.request for generation in self.generations]

    async def submit(self, request: GenerationRequest) -> FakeGeneration:
        await asyncio.sleep(0)
        if self.refusal is not None and len(self.generations) >= self.accepts:
            raise self.refusal
        script = self.script if isinstance(self.script, Script) else self.script(request)
        self.generations.append(FakeGeneration(request, script))
        return self.generations[-1]

    def route(self, request: GenerationRequest) -> Route:
        if self.refusal is not None:
            raise self.refusal
        self.routed.append(request)
        return ROUTE

    def all_closed(self) -> bool:
        return all(generation.closed.is_set() for generation in self.generations)

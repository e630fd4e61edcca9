"""One HTTP request being answered: its generations, followed at once, and the text of its choices."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from services.gateway.choice import ChoiceText, Delta
from services.gateway.generation import (
    ChoiceEvent,
    Dispatcher,
    Generation,
    GenerationRequest,
    TokensEvent,
    Usage,
    UsageEvent,
)
from services.gateway.http_metrics import AnswerTimer
from services.gateway.prepare import Job, Prompt
from services.gateway.vocabulary import Vocabulary
from tailrace.errors import InternalError
from tailrace.types import FinishReason

Sink = Callable[[int, Delta, FinishReason | None], None]
"""Takes (index of the choice, what became printable, why it ended if it did)."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a request comes from."""

    request_id: str
    deadline_s: float
    traceparent: str = ""
    tracestate: str = ""


class Answer:
    """Owns the generations. Whoever makes one must `aclose` it, whatever happens in between."""

    def __init__(self, job: Job, vocabulary: Vocabulary, timer: AnswerTimer) -> None:
        self.job = job
        self._timer = timer
        self._generations: list[Generation] = []
        self._choices = [ChoiceText(vocabulary, job, prompt) for prompt in job.prompts for _ in range(job.num_choices)]
        self._echoes = {i: job.prompts[i // job.num_choices].echo for i in range(len(self._choices))}
        self._usages: list[Usage] = []

    @property
    def num_choices(self) -> int:
        return len(self._choices)

    async def start(self, dispatcher: Dispatcher, origin: Origin) -> None:
        """Raises what `Dispatcher.submit` raises."""
        for index, prompt in enumerate(self.job.prompts):
            self._generations.append(await dispatcher.submit(self._request(index, prompt, origin)))

    def _request(self, index: int, prompt: Prompt, origin: Origin) -> GenerationRequest:
        is_only = len(self.job.prompts) == 1
        return GenerationRequest(
            request_id=origin.request_id if is_only else f"{origin.request_id}-{index}",
            prompt_tokens=prompt.tokens,
            sampling=replace(self.job.sampling, max_tokens=prompt.max_tokens),
            num_choices=self.job.num_choices,
            priority=self.job.priority,
            deadline_s=origin.deadline_s,
            cache_salt=self.job.cache_salt,
            traceparent=origin.traceparent,
            tracestate=origin.tracestate,
        )

    async def run(self, sink: Sink) -> None:
        """Returns when every generation has ended. Raises the first TailraceError of any of them."""
        if len(self._generations) == 1:
            await self._follow(0, sink)
        else:
            await self._follow_all(sink)
        usage = self.usage
        self._timer.total(
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
        )

    async def _follow_all(self, sink: Sink) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for index in range(len(self._generations)):
                    group.create_task(self._follow(index, sink))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _follow(self, index: int, sink: Sink) -> None:
        generation = self._generations[index]
        first = index * self.job.num_choices
        async for event in generation:
            match event:
                case TokensEvent():
                    self._feed(first + event.choice, event, sink)
                    if self._choices[first + event.choice].reason is not None:
                        generation.finish_choice(event.choice)
                case ChoiceEvent():
                    self._finish(first + event.choice, event.reason, sink)
                case UsageEvent():
                    self._usages.append(event.usage)
        if any(choice.reason is None for choice in self._choices[first : first + self.job.num_choices]):
            raise InternalError("a generation ended before all of its choices")

    def _feed(self, index: int, event: TokensEvent, sink: Sink) -> None:
        choice = self._choices[index]
        if choice.reason is None:
            self._emit(index, choice.feed(event.token_ids, event.logprobs), sink)

    def _finish(self, index: int, reason: FinishReason, sink: Sink) -> None:
        choice = self._choices[index]
        if choice.reason is None:
            self._emit(index, choice.finish(reason), sink)

    def _emit(self, index: int, delta: Delta, sink: Sink) -> None:
        choice = self._choices[index]
        if echo := self._echoes.pop(index, ""):
            delta = Delta(echo + delta.text, delta.tokens)
        if delta:
            self._timer.content(index)
        if choice.reason is not None:
            self._timer.end(index, choice.num_tokens)
        if delta or choice.reason is not None:
            sink(index, delta, choice.reason)

    @property
    def usage(self) -> Usage:
        """Of all prompts together: tokens and bytes add up, seconds are those of the slowest."""
        completion_tokens = sum(choice.num_tokens for choice in self._choices)
        return combine(self._usages, self.job.num_prompt_tokens, completion_tokens)

    async def aclose(self) -> None:
        """Gives everything back. Idempotent, and finished even when the caller is cancelled meanwhile."""
        await asyncio.shield(asyncio.gather(*(generation.aclose() for generation in self._generations)))


def combine(usages: Sequence[Usage], prompt_tokens: int, completion_tokens: int) -> Usage:
    tiers = {tier for usage in usages for tier in usage.cached_by_tier}
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        cached_tokens=sum(usage.cached_tokens for usage in usages),
        queue_s=max((usage.queue_s for usage in usages), default=0.0),
        prefill_s=max((usage.prefill_s for usage in usages), default=0.0),
        transfer_s=max((usage.transfer_s for usage in usages), default=0.0),
        transfer_bytes=sum(usage.transfer_bytes for usage in usages),
        transport=",".join(sorted({usage.transport for usage in usages if usage.transport})),
        decode_s=max((usage.decode_s for usage in usages), default=0.0),
        ttft_s=max((usage.ttft_s for usage in usages), default=0.0),
        cached_by_tier={tier: sum(usage.cached_by_tier.get(tier, 0) for usage in usages) for tier in sorted(tiers)},
    )

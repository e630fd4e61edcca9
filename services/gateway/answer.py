"""One HTTP request being answered: its generations, listened to at once, and the text of its choices."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from services.gateway.choice import ChoiceText, Delta
from services.gateway.explain import describe
from services.gateway.generation import Dispatcher, Generation, GenerationRequest, Usage
from services.gateway.http_metrics import AnswerTimer
from services.gateway.outlet import Outlet
from services.gateway.prepare import Job, Prompt
from services.gateway.vocabulary import Vocabulary
from tailrace.errors import InternalError
from tailrace.types import FinishReason, TokenLogprob


class Reader(Protocol):
    """Who gets an answer. Called on the event loop, in the middle of a worker's message: returns soon."""

    def take(self, index: int, delta: Delta, reason: FinishReason | None) -> None:
        """What became printable of the choice `index`, and why it ended if it did."""
        ...

    def close(self, error: Exception | None) -> None:
        """Nothing follows: every choice has ended, or the request has failed. Called once."""
        ...


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a request comes from."""

    request_id: str
    deadline_s: float
    traceparent: str = ""
    tracestate: str = ""
    session_id: str = ""


class Answer:
    """Owns the generations. Whoever makes one must `aclose` it, whatever happens in between."""

    def __init__(self, job: Job, vocabulary: Vocabulary, timer: AnswerTimer) -> None:
        self.job = job
        self._timer = timer
        self._generations: list[Generation] = []
        self._choices = [ChoiceText(vocabulary, job, prompt) for prompt in job.prompts for _ in range(job.num_choices)]
        echoes = (job.prompts[i // job.num_choices].echo for i in range(len(self._choices)))
        self._echoes = {i: echo for i, echo in enumerate(echoes) if echo}
        self._usages: list[Usage] = []
        self._reader: Reader | None = None
        self._outlet: Outlet | None = None
        self.is_closed = False

    def foresee(self, dispatcher: Dispatcher, origin: Origin) -> list[dict[str, Any]]:
        """Where each prompt would go now, and why; nothing is started. Raises what `Dispatcher.route` raises."""
        requests = [self._request(index, prompt, origin) for index, prompt in enumerate(self.job.prompts)]
        return [describe(dispatcher.route(request), len(request.prompt_tokens)) for request in requests]

    def explain(self) -> list[dict[str, Any]]:
        """Where each prompt went, and why. Before anybody follows."""
        pairs = zip(self._generations, self.job.prompts, strict=True)
        return [describe(g.route, len(prompt.tokens)) for g, prompt in pairs if g.route is not None]

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
            session_id=origin.session_id,
            traceparent=origin.traceparent,
            tracestate=origin.tracestate,
        )

    def divert(self, outlet: Outlet) -> None:
        """The short way of an answer of one choice; see `Generation.divert`."""
        self._outlet = outlet
        self._generations[0].divert(0, outlet)

    def settle(self) -> None:
        """Counts what went the short way."""
        if self._outlet is not None and (num_tokens := self._outlet.num_new()):
            self._choices[0].num_tokens += num_tokens
            self._timer.clock(0).last = self._outlet.wrote_at

    def choice(self, index: int) -> ChoiceText:
        return self._choices[index]

    def follow(self, reader: Reader) -> None:
        """The reader gets what has come so far before this returns, the rest as it comes. Called once."""
        self._reader = reader
        for index, generation in enumerate(self._generations):
            first = index * self.job.num_choices
            generation.listen(_Part(self, generation, first, self._choices[first : first + self.job.num_choices]))

    def finish_part(self, usage: Usage) -> None:
        """One generation has ended."""
        self._usages.append(usage)
        if len(self._usages) == len(self._generations):
            total = self.usage
            self._timer.total(
                prompt_tokens=total.prompt_tokens,
                cached_tokens=total.cached_tokens,
                completion_tokens=total.completion_tokens,
            )
            self.close(None)

    def close(self, error: Exception | None) -> None:
        """The first error of any generation is that of the answer."""
        if not self.is_closed and self._reader is not None:
            self.is_closed = True
            self._reader.close(error)

    def emit(self, index: int, choice: ChoiceText, delta: Delta) -> None:
        if self._echoes and (echo := self._echoes.pop(index, "")):
            delta = Delta(echo + delta.text, delta.tokens)
        reason = choice.reason
        if delta.text or delta.tokens:
            self._timer.content(index)
        elif reason is None:
            return
        if reason is not None:
            self._timer.end(index, choice.num_tokens)
        if self._reader is not None:
            self._reader.take(index, delta, reason)

    @property
    def usage(self) -> Usage:
        """Of all prompts together: tokens and bytes add up, seconds are those of the slowest."""
        completion_tokens = sum(choice.num_tokens for choice in self._choices)
        return combine(self._usages, self.job.num_prompt_tokens, completion_tokens)

    async def aclose(self) -> None:
        """Gives everything back. Idempotent, and finished even when the caller is cancelled meanwhile."""
        self.is_closed = True
        await asyncio.shield(asyncio.gather(*(generation.aclose() for generation in self._generations)))


class _Part:
    """Listens to one generation, whose choices are those from `first` on in the answer."""

    def __init__(self, answer: Answer, generation: Generation, first: int, choices: Sequence[ChoiceText]) -> None:
        self._answer = answer
        self._generation = generation
        self._first = first
        self._choices = choices

    def on_tokens(
        self, choice: int, position: int, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] | None
    ) -> None:
        text = self._choices[choice]
        if text.reason is not None or self._answer.is_closed:
            return
        self._answer.settle()
        self._answer.emit(self._first + choice, text, text.feed(token_ids, logprobs))
        if text.reason is not None:
            self._generation.finish_choice(choice)

    def on_choice_ended(self, choice: int, reason: FinishReason) -> None:
        text = self._choices[choice]
        if text.reason is None and not self._answer.is_closed:
            self._answer.settle()
            self._answer.emit(self._first + choice, text, text.finish(reason))

    def on_finished(self, usage: Usage) -> None:
        if any(text.reason is None for text in self._choices):
            self._answer.close(InternalError("a generation ended before all of its choices"))
        else:
            self._answer.finish_part(usage)

    def on_failed(self, error: Exception) -> None:
        self._answer.close(error)


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

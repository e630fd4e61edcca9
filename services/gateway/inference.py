"""`Generate` without its protocol: a request is checked and accepted, and its events wait for the client's pace."""

import asyncio
import json
import logging
import math
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from services.gateway import generation
from services.gateway.answer import combine
from services.gateway.caller import ApiKeys, Trace, request_id_of, session_id_of
from services.gateway.choice import ChoiceText
from services.gateway.generate import no_such_model
from services.gateway.generation import Dispatcher, Generation, GenerationRequest
from services.gateway.prepare import Job, RequestLimits, ServedModel, prepare_chat, prepare_completion
from services.gateway.schemas import ChatBody, CompletionBody, parse_body
from services.gateway.tokenizer import TokenizerPool
from services.gateway.vocabulary import Vocabulary
from tailrace.errors import ErrorCode, InternalError, InvalidRequestError, TailraceError
from tailrace.inference import (
    ChatPrompt,
    Finished,
    GenerateRequest,
    Started,
    TextPrompt,
    TokenChunk,
    TokenPrompt,
    Usage,
)
from tailrace.types import FinishReason, TokenLogprob

log = logging.getLogger(__name__)

MAX_DEADLINE_S = 86_400.0
StreamEvent = Started | TokenChunk | Finished | TailraceError
"""A TailraceError is the last one of a request that has failed."""


@dataclass(frozen=True, slots=True)
class InferenceOptions:
    api_keys: tuple[str, ...] = ()
    """Empty: everyone may ask."""
    max_request_bytes: int = 16 << 20
    deadline_s: float = 600.0
    """Of a request that names none."""
    slow_client_s: float = 30.0
    """A client that reads nothing for so long is cut."""
    limits: RequestLimits = field(default_factory=RequestLimits)
    num_tokenizer_threads: int = 2


class Inference:
    """Judges requests by the same rules as the HTTP edge, and hands the good ones to the dispatcher."""

    def __init__(self, dispatcher: Dispatcher, model: ServedModel, options: InferenceOptions) -> None:
        self.options = options
        self._dispatcher = dispatcher
        self._model = model
        self._keys = ApiKeys(options.api_keys)
        self._tokenizers = TokenizerPool(num_threads=options.num_tokenizer_threads)

    async def accept(self, read: Callable[[], GenerateRequest], authorization: str) -> "EventStream":
        """`read` is called off the event loop. Raises TailraceError for a request that is refused.

        When it raises or is cancelled, nothing is left running.
        """
        try:
            self._keys.check(authorization)
            request, job = await self._tokenizers.run(lambda: self._prepare(read()))
            submitted = self._submission(request, job)
            accepted = await self._dispatcher.submit(submitted)
        except TailraceError as error:
            raise presentable(error, f"refusal {uuid.uuid4().hex[:8]}") from None
        except Exception as error:
            raise presentable(error, f"refusal {uuid.uuid4().hex[:8]}") from error
        return EventStream(accepted, submitted, job, self._model.tokenizer.vocabulary)

    def _prepare(self, request: GenerateRequest) -> tuple[GenerateRequest, Job]:
        """Through the HTTP edge's own bodies: one set of limits, and one wording for each error."""
        if request.model and request.model not in self._model.names:
            raise no_such_model(request.model, self._model)
        fields = _body_fields(request) | {"model": request.model or self._model.names[0]}
        logprobs = request.sampling.logprobs
        match request.prompt:
            case ChatPrompt(messages):
                fields |= {"messages": [asdict(m) for m in messages], "logprobs": None if logprobs is None else True}
                fields["top_logprobs"] = logprobs
                return request, self._prepare_chat(fields)
            case TokenPrompt(ids):
                fields["prompt"] = list(ids)
            case TextPrompt(text):
                fields["prompt"] = text
        body = parse_body(CompletionBody, json.dumps(fields).encode())
        return request, prepare_completion(body, self._model, self.options.limits)

    def _prepare_chat(self, fields: dict[str, Any]) -> Job:
        try:
            body = parse_body(ChatBody, json.dumps(fields).encode())
        except InvalidRequestError as error:
            if error.param != "top_logprobs":
                raise
            raise InvalidRequestError(error.message.replace("top_logprobs", "logprobs"), param="logprobs") from None
        return prepare_chat(body, self._model, self.options.limits)

    def _submission(self, request: GenerateRequest, job: Job) -> GenerationRequest:
        prompt = job.prompts[0]
        trace = Trace.of(request.traceparent, request.tracestate)
        return GenerationRequest(
            request_id=request_id_of(request.request_id),
            prompt_tokens=prompt.tokens,
            sampling=replace(job.sampling, max_tokens=prompt.max_tokens),
            num_choices=job.num_choices,
            priority=job.priority,
            deadline_s=self._deadline_s(request.deadline_s),
            cache_salt=job.cache_salt,
            session_id=session_id_of(request.session_id, "session_id"),
            traceparent=trace.parent,
            tracestate=trace.state,
        )

    def _deadline_s(self, asked: float) -> float:
        if not (math.isfinite(asked) and 0 <= asked <= MAX_DEADLINE_S):
            raise InvalidRequestError(f"deadline_s: must be from 0 to {MAX_DEADLINE_S:g}", param="deadline_s")
        return asked or self.options.deadline_s


def _body_fields(request: GenerateRequest) -> dict[str, Any]:
    fields = asdict(request.sampling)
    return fields | {"stop": list(request.stop), "priority": request.priority, "cache_salt": request.cache_salt}


def presentable(error: BaseException, what: str) -> TailraceError:
    """What a client may hear: of a defect of ours nothing but `what`, under which the log has the details."""
    if isinstance(error, TailraceError) and error.code is not ErrorCode.INTERNAL:
        return error
    log.error("%s failed", what, exc_info=error)
    return InternalError(f"the gateway failed to answer; its log has the reason under {what}")


class EventStream:
    """One accepted request, which it owns, and listens to. Iterated once; whoever has it must `aclose` it."""

    def __init__(self, accepted: Generation, request: GenerationRequest, job: Job, vocabulary: Vocabulary) -> None:
        self._generation = accepted
        self._request = request
        self._choices = [ChoiceText(vocabulary, job, job.prompts[0]) for _ in range(job.num_choices)]
        self._outbox = Outbox()
        self._cutting: asyncio.Task[None] | None = None

    async def __aiter__(self) -> AsyncIterator[StreamEvent]:
        """Between two events the client may take its time: what comes meanwhile is joined to one chunk a choice."""
        try:
            self._generation.listen(self)
        except Exception as error:
            self.on_failed(error)
        yield Started(self._request.request_id, len(self._request.prompt_tokens), self._request.sampling.seed)
        while (event := await self._outbox.take()) is not None:
            yield event

    def cut(self, error: TailraceError) -> None:
        """Gives everything back, with what the client has not taken yet; all it can still take is the error."""
        self._cutting = asyncio.create_task(self._generation.aclose())
        self._outbox.cut(error)

    async def aclose(self) -> None:
        """Gives everything back. Idempotent, and finished even when the caller is cancelled meanwhile."""
        await asyncio.shield(self._generation.aclose())

    # -- Listener -----------------------------------------------------------------------------------------------------

    def on_tokens(
        self, choice: int, position: int, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] | None
    ) -> None:
        text = self._choices[choice]
        if text.reason is not None:
            return
        before = text.num_tokens
        shown = text.feed(token_ids, None).text
        count = text.num_tokens - before
        scores = () if logprobs is None else tuple(logprobs[:count])
        self._outbox.put(TokenChunk(choice, position, tuple(token_ids[:count]), shown, scores, text.reason))
        if text.reason is not None:
            self._generation.finish_choice(choice)

    def on_choice_ended(self, choice: int, reason: FinishReason) -> None:
        text = self._choices[choice]
        if text.reason is None:
            shown = text.finish(reason).text
            position = len(self._request.prompt_tokens) + text.num_tokens
            self._outbox.put(TokenChunk(choice, position, (), shown, (), text.reason))

    def on_finished(self, usage: generation.Usage) -> None:
        num_tokens = sum(text.num_tokens for text in self._choices)
        total = combine([usage], len(self._request.prompt_tokens), num_tokens)
        self._outbox.close(Finished(Usage(**asdict(total))))

    def on_failed(self, error: Exception) -> None:
        self._outbox.close(presentable(error, f"request {self._request.request_id}"))


@dataclass(slots=True)
class _Waiting:
    """Chunks of one choice, joined."""

    position: int
    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: FinishReason | None = None

    def add(self, chunk: TokenChunk) -> None:
        self.token_ids += chunk.token_ids
        self.texts.append(chunk.text)
        self.logprobs += chunk.logprobs
        self.reason = chunk.finish_reason


class Outbox:
    """Between a generation and its client: at most one chunk a choice waits, and then the end, which is the first."""

    def __init__(self) -> None:
        self._waiting: dict[int, _Waiting] = {}
        self._end: Finished | TailraceError | None = None
        self._is_over = False
        self._news = asyncio.Event()

    def put(self, chunk: TokenChunk) -> None:
        if self._has_ended:
            return
        self._waiting.setdefault(chunk.choice, _Waiting(chunk.position)).add(chunk)
        self._news.set()

    @property
    def _has_ended(self) -> bool:
        return self._end is not None or self._is_over

    def close(self, end: Finished | TailraceError) -> None:
        if not self._has_ended:
            self._end = end
            self._news.set()

    def cut(self, error: TailraceError) -> None:
        """The error takes the place of all that waits."""
        self._waiting.clear()
        self._end = error
        self._news.set()

    async def take(self) -> TokenChunk | Finished | TailraceError | None:
        """The choice that has waited longest; None after the end."""
        while not self._waiting and not self._has_ended:
            self._news.clear()
            await self._news.wait()
        if self._waiting:
            choice = next(iter(self._waiting))
            part = self._waiting.pop(choice)
            text = "".join(part.texts)
            return TokenChunk(choice, part.position, tuple(part.token_ids), text, tuple(part.logprobs), part.reason)
        end, self._end, self._is_over = self._end, None, True
        return end

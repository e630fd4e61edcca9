"""One request from its route to its last token.

Its legs run on workers; their tokens are released in order and each once; when a pair is lost another takes over.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from services.gateway.generation import GenerationRequest, Listener, Usage
from services.gateway.members import Member
from services.gateway.outlet import Outlet
from tailrace.errors import InternalError, TailraceError
from tailrace.lifecycle import Lifecycle, RequestState
from tailrace.messages import LegReport
from tailrace.policy.routing import Route
from tailrace.types import FinishReason, Role, TokenLogprob

log = logging.getLogger(__name__)

_NEAREST = ("worker", "peer", "cpu", "nvme")
"""Tiers of LegReport.cached_by_tier."""


@dataclass(slots=True, eq=False)
class Leg:
    """What a request has on one worker. Tells its session what it hears; says nothing any more once it is detached."""

    session: "RequestSession"
    attempt: "Attempt"
    member: Member
    handle: int
    role: Role

    def on_tokens(self, choice: int, position: int, ids: list[int], logprobs: list[TokenLogprob] | None) -> None:
        attempt = self.attempt
        if choice not in attempt.choices:
            self._check(choice)
        if self.role is Role.DECODE and not attempt.has_joined:
            attempt.has_joined = True
            if attempt.prefill is None:
                # Its report comes with the end of the answer only.
                self.member.computed(self.handle)
        self.session.take_tokens(choice, position, ids, logprobs, self.role)

    def on_report(self, report: LegReport) -> None:
        self.session.take_report(self, report)

    def on_finished(self, choice: int, reason: FinishReason) -> None:
        self._check(choice)
        self.session.end_choice(choice, reason)

    def on_failed(self, error: TailraceError) -> None:
        self.session.leg_failed(self, error)

    def _check(self, choice: int) -> None:
        if choice not in self.attempt.choices:
            raise InternalError(f"{self.member.info.worker_id} speaks of choice {choice}, which it was not given")


@dataclass(slots=True, eq=False)
class Attempt:
    """One try at some choices of a request, on one pair."""

    number: int
    choices: tuple[int, ...]
    prefill: Leg | None = None
    decode: Leg | None = None
    has_joined: bool = False
    """The decode leg speaks: it needs its prefill leg no more."""
    decode_report: LegReport | None = None

    def legs(self) -> list[Leg]:
        """Decode first: cancelled the other way round, it would take its owner's silence for a loss."""
        return [leg for leg in (self.decode, self.prefill) if leg is not None]


@dataclass(slots=True)
class _Choice:
    """What has been released of a choice."""

    reason: FinishReason | None = None
    outlet: Outlet | None = None
    """The short way of its tokens, if they have one."""
    num_losses: int = 0
    num_refusals: int = 0
    _tokens: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        if self.outlet is not None:
            self._tokens += self.outlet.collect()
        return self._tokens

    def release(self, ids: list[int], position: int) -> None:
        """`position` is that of the first of them."""
        self._tokens += ids
        if self.outlet is not None:
            self.outlet.expect(position + len(ids))

    @property
    def is_over(self) -> bool:
        return self.reason is not None


@dataclass(frozen=True, slots=True)
class _Untold:
    """What came before anybody listened: tokens, or the end of a choice."""

    choice: int
    position: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    reason: FinishReason | None = None

    def tell(self, listener: Listener) -> None:
        if self.reason is None:
            listener.on_tokens(self.choice, self.position, self.token_ids, self.logprobs)
        else:
            listener.on_choice_ended(self.choice, self.reason)


class RequestSession:
    """A Generation. `recover` is called, once a lost attempt, to start others; it owns the decision whether to."""

    def __init__(self, request: GenerationRequest, wire_id: str, recovery: "Recovery", route: Route) -> None:
        self.request = request
        self.route: Route | None = route
        self.wire_id = wire_id
        """The request's id among the workers: unique, whatever the client called it."""
        self.began = time.monotonic()
        self.life = Lifecycle.begin(self.began)
        self.num_attempts = 0
        self.traceparent, self.tracestate = request.traceparent, request.tracestate
        """What workers get: the client's own, or the gateway's span below it."""
        self.workers: dict[Role, list[str]] = {role: [] for role in Role}
        """Ids of those that were given a leg, in order."""
        self.usage: Usage | None = None
        """Known once it is over, whatever its end."""
        self.timer: asyncio.TimerHandle | None = None
        """Ends the request when no worker does."""
        self._recovery = recovery
        self._attempts: list[Attempt] = []
        self._choices = [_Choice() for _ in range(request.num_choices)]
        self._listener: Listener | None = None
        self._untold: deque[_Untold] = deque()
        self.error: TailraceError | None = None
        self._is_over = False
        self._num_prompt_tokens = len(request.prompt_tokens)
        self._first_token_at = 0.0
        self._last_role: Role | None = None
        """Of the token noted last; None: none since the last move."""
        self._known_blocks = route.known_blocks
        self._prompt_report: LegReport | None = None
        """Of whoever prefilled first: a replay finds cached what was computed for this very request."""
        self._tasks: set[asyncio.Task[None]] = set()

    # -- Generation ---------------------------------------------------------------------------------------------------

    def listen(self, listener: Listener) -> None:
        self.route = None
        # Not the listener yet: it may finish a choice while others have not been told all.
        while self._untold:
            self._untold.popleft().tell(listener)
        self._listener = listener
        if self._is_over:
            self._tell_end(listener)

    def _tell_end(self, listener: Listener) -> None:
        if self.error is not None:
            listener.on_failed(self.error)
        elif self.usage is not None and self.life.state is RequestState.FINISHED:
            listener.on_finished(self.usage)

    def divert(self, choice: int, outlet: Outlet) -> None:
        state = self._choices[choice]
        outlet.expect(self._num_prompt_tokens + len(state.tokens))
        state.outlet = outlet
        self._connect_legs()

    def _connect_legs(self) -> None:
        """The short way is open to a decode leg that has spoken, of a request of one choice."""
        for attempt in self._attempts:
            if (leg := attempt.decode) is None or not attempt.has_joined or len(self._choices) != 1:
                continue
            state = self._choices[0]
            if state.outlet is not None and not state.is_over:
                leg.member.connect(leg.handle, state.outlet)

    def finish_choice(self, choice: int) -> None:
        self._withdraw(choice)
        if self._is_over or self._choices[choice].is_over:
            return
        for attempt in self._attempts:
            if choice in attempt.choices and attempt.decode is not None:
                attempt.decode.member.cancel(attempt.decode.handle, (choice,))
        self._close_choice(choice, FinishReason.STOP)

    def _withdraw(self, choice: int) -> None:
        """What the listener was not told of this choice, it never had."""
        num_untold = sum(len(piece.token_ids) for piece in self._untold if piece.choice == choice)
        self._untold = deque(piece for piece in self._untold if piece.choice != choice)
        tokens = self._choices[choice].tokens
        del tokens[len(tokens) - num_untold :]
        if self.usage is not None:
            self.usage = replace(self.usage, completion_tokens=self.num_released)

    async def aclose(self) -> None:
        if not self._is_over:
            self._end(RequestState.CANCELLED)
        self._listener = None
        for task in self._tasks:
            task.cancel()

    # -- what the dispatcher does -------------------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        return self._is_over

    @property
    def remaining_s(self) -> float:
        return self.request.deadline_s - (time.monotonic() - self.began)

    def open_choices(self, choices: Sequence[int]) -> tuple[int, ...]:
        return tuple(c for c in choices if not self._choices[c].is_over)

    @property
    def finish_reasons(self) -> list[FinishReason]:
        return [state.reason for state in self._choices if state.reason is not None]

    @property
    def num_released(self) -> int:
        return sum(len(state.tokens) for state in self._choices)

    def released(self, choice: int) -> list[int]:
        """Tokens given to the client so far: what another worker must be told."""
        return self._choices[choice].tokens

    def tokens(self, choice: int) -> list[int]:
        """The prompt, and what a worker that takes over replays after it."""
        return [*self.request.prompt_tokens, *self.released(choice)]

    def count_retry(self, choices: Sequence[int], *, refused: bool) -> int:
        """One more lost or refused attempt at these choices. Returns how many of its kind the most unlucky one had."""
        states = [self._choices[c] for c in choices]
        for state in states:
            state.num_refusals += refused
            state.num_losses += not refused
        return max(state.num_refusals if refused else state.num_losses for state in states)

    def begin_attempt(self, choices: tuple[int, ...]) -> Attempt:
        attempt = Attempt(self.num_attempts, choices)
        self.num_attempts += 1
        self._attempts.append(attempt)
        return attempt

    def abandon(self, attempt: Attempt) -> None:
        """Hear no more of it, and let its workers know; a leg that has ended there ignores the cancel. Idempotent."""
        if attempt not in self._attempts:
            return
        self._attempts.remove(attempt)
        for leg in attempt.legs():
            leg.member.cancel(leg.handle)

    def fail(self, error: TailraceError) -> None:
        """Ends the request with a terminal error."""
        if not self._is_over:
            self.error = error
            self._end(RequestState.FAILED)

    def move(self, state: RequestState, at: float | None = None) -> None:
        self._last_role = None
        self.life.move(state, time.monotonic() if at is None else at)

    # -- what the legs say --------------------------------------------------------------------------------------------

    def take_tokens(
        self, choice: int, position: int, ids: list[int], logprobs: list[TokenLogprob] | None, role: Role
    ) -> None:
        """Release what is new. Both legs tell the first token; a worker that was replaced may tell old ones."""
        if self._is_over or not 0 <= choice < len(self._choices):
            return
        state = self._choices[choice]
        if state.reason is not None:
            return
        expected = self._num_prompt_tokens + len(state.tokens)
        skip = expected - position
        if skip < 0:
            self.fail(InternalError(f"choice {choice}: token {position} came before token {expected}"))
            return
        if skip >= len(ids):
            return
        if role is not self._last_role:
            self._note_token(role)
        if logprobs is not None:
            logprobs = logprobs[skip:] if self.request.sampling.logprobs is not None else None
        if skip:
            ids = ids[skip:]
        state.release(ids, expected)
        if self._listener is not None:
            self._listener.on_tokens(choice, expected, ids, logprobs)
        else:
            self._untold.append(_Untold(choice, expected, ids, logprobs))

    def _note_token(self, role: Role) -> None:
        now = time.monotonic()
        self._first_token_at = self._first_token_at or now
        if role is Role.DECODE and self.life.state is not RequestState.DECODING:
            if self.life.state is RequestState.QUEUED:
                self.move(RequestState.PREFILLING, now)
            self.move(RequestState.DECODING, now)
        self._last_role = role
        self._connect_legs()

    def take_report(self, leg: Leg, report: LegReport) -> None:
        if leg.role is Role.DECODE:
            leg.attempt.decode_report = report
        if leg.role is Role.PREFILL or leg.attempt.prefill is None:
            self._prompt_report = self._prompt_report or self._without_own(leg, report)
        if leg.role is Role.PREFILL and self.life.state is RequestState.QUEUED:
            now, queued_at = time.monotonic(), self.life.moves[-1][1]
            self.move(RequestState.PREFILLING, max(queued_at, now - report.prefill_s))
            self.move(RequestState.TRANSFERRING, now)

    def _without_own(self, leg: Leg, report: LegReport) -> LegReport:
        """A replay is not told of more cached tokens than anybody had before the request came."""
        if leg.attempt.number == 0:
            return report
        known_tokens = self._known_blocks * leg.member.info.layout.block_size
        return replace(report, cached_tokens=min(report.cached_tokens, known_tokens))

    def end_choice(self, choice: int, reason: FinishReason) -> None:
        if self._is_over or self._choices[choice].is_over:
            return
        if self._listener is not None:
            self._listener.on_choice_ended(choice, reason)
        else:
            self._untold.append(_Untold(choice, reason=reason))
        self._close_choice(choice, reason)

    def leg_failed(self, leg: Leg, error: TailraceError) -> None:
        """The attempt is lost with either of its legs, unless prefill had done its part."""
        attempt = leg.attempt
        if self._is_over or attempt not in self._attempts or (leg.role is Role.PREFILL and attempt.has_joined):
            return
        self.abandon(attempt)
        choices = self.open_choices(attempt.choices)
        if choices:
            log.warning("%s/%d: %s leg: %s", self.wire_id, attempt.number, leg.role, error.message)
            self._later(self._recovery.recover(self, choices, error))

    # -- inside -------------------------------------------------------------------------------------------------------

    def _close_choice(self, choice: int, reason: FinishReason) -> None:
        self._choices[choice].reason = reason
        for attempt in self._attempts:
            if choice in attempt.choices and attempt.decode is not None:
                attempt.decode.member.disconnect(attempt.decode.handle)
        if all(state.is_over for state in self._choices):
            self._end(RequestState.FINISHED)

    def _end(self, state: RequestState) -> None:
        self._is_over = True
        self.move(state)
        self.usage = self._usage()
        for attempt in list(self._attempts):
            self.abandon(attempt)
        self._recovery.ended(self)
        if self._listener is not None:
            self._tell_end(self._listener)

    def _later(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _usage(self) -> Usage:
        now = time.monotonic()
        prompt = self._prompt_report or LegReport(0)
        decodes = [attempt.decode_report for attempt in self._attempts if attempt.decode_report is not None]
        first = self._first_token_at or now
        # A replayed prompt is longer than the client's, and may be cached as a whole.
        num_prompt_tokens = self._num_prompt_tokens
        cached_tokens = min(prompt.cached_tokens, num_prompt_tokens)
        return Usage(
            prompt_tokens=num_prompt_tokens,
            completion_tokens=self.num_released,
            cached_tokens=cached_tokens,
            queue_s=prompt.queue_s,
            prefill_s=prompt.prefill_s,
            transfer_s=max((report.transfer_s for report in decodes), default=0.0),
            transfer_bytes=sum(report.transfer_bytes for report in decodes),
            transport=next((report.transport for report in decodes if report.transport), ""),
            decode_s=max((report.decode_s for report in decodes), default=0.0) or now - first,
            ttft_s=first - self.began,
            cached_by_tier=_itemised(prompt.cached_by_tier, cached_tokens),
        )


class Recovery(Protocol):
    """Who may start a lost request again."""

    async def recover(self, session: RequestSession, choices: tuple[int, ...], error: TailraceError) -> None: ...

    def ended(self, session: RequestSession) -> None: ...


def _itemised(cached_by_tier: dict[str, int], cached_tokens: int) -> dict[str, int]:
    """Adds up to `cached_tokens`: cut from the farthest tier on, and what no tier is named for was the worker's own."""
    left, items = cached_tokens, {}
    for tier in sorted(cached_by_tier, key=_distance):
        if num_tokens := min(cached_by_tier[tier], left):
            items[tier] = num_tokens
            left -= num_tokens
    if left:
        items[_NEAREST[0]] = items.get(_NEAREST[0], 0) + left
    return items


def _distance(tier: str) -> tuple[int, str]:
    return (_NEAREST.index(tier) if tier in _NEAREST else len(_NEAREST), tier)

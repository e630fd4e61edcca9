"""The gateway's Dispatcher: route, submit both legs at once, and start again elsewhere what was lost."""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable

from services.gateway.generation import GenerationRequest
from services.gateway.members import Member, Members
from services.gateway.session import Attempt, Leg, RequestSession
from services.gateway.sourcing import Sourcing
from tailrace.errors import (
    DeadlineExceededError,
    ErrorCode,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    TailraceError,
    UnavailableError,
    WorkerLostError,
)
from tailrace.index.prefix_index import PrefixIndex
from tailrace.kv.chains import Chains
from tailrace.kv.hashing import chain_seed
from tailrace.lifecycle import RequestState
from tailrace.messages import KvSource, PrefixSource, Submission
from tailrace.policy.router import Router
from tailrace.policy.routing import Route, RouteRequest
from tailrace.policy.sessions import session_key
from tailrace.rpc.auth import sign_ticket
from tailrace.types import Role

log = logging.getLogger(__name__)

MAX_RETRIES = 2
"""Of a request whose worker was lost: it may be what its workers die of."""
MAX_REFUSALS = 60
"""Of a request whose workers have no room; the pause between them is what the refusing worker asks for."""
RETRY_AFTER_S = 1.0
DEADLINE_GRACE_S = 2.0
"""Workers know the deadline, and say more about what was going on; this is for when they say nothing."""


class PairDispatcher:
    """Event loop only."""

    def __init__(
        self,
        members: Members,
        index: PrefixIndex,
        chains: Chains,
        *,
        secret: bytes,
        max_concurrent: int,
        routing_policy: str = "cost",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock`: seconds, of how long workers have had what they were sent."""
        self._clock = clock
        self._members = members
        self.router = Router(index, routing_policy)
        self._sourcing = Sourcing(members, clock)
        self._chains = chains
        self._secret = secret
        self._max_concurrent = max_concurrent
        self._sessions: set[RequestSession] = set()
        self.on_retry: Callable[[ErrorCode], None] = lambda code: None
        self.on_begun: Callable[[RequestSession], None] = lambda session: None
        self.on_ended: Callable[[RequestSession], None] = lambda session: None
        """Called once for each that has begun."""

    @property
    def num_running(self) -> int:
        return len(self._sessions)

    async def submit(self, request: GenerationRequest) -> RequestSession:
        """Raises OverloadedError when too much runs already, UnavailableError when no pair can serve."""
        if len(self._sessions) >= self._max_concurrent:
            raise OverloadedError(f"{self._max_concurrent} requests are running", retry_after_s=RETRY_AFTER_S)
        route = self.route(request)
        session = RequestSession(request, f"{request.request_id}~{uuid.uuid4().hex[:8]}", self, route)
        self._begin(session)
        choices = tuple(range(request.num_choices))
        try:
            try:
                self._start(session, choices, route)
            except WorkerLostError as lost:
                await self.recover(session, choices, lost)
        except BaseException:
            await session.aclose()
            raise
        return session

    def _begin(self, session: RequestSession) -> None:
        self._sessions.add(session)
        patience_s = max(0.0, session.request.deadline_s) + DEADLINE_GRACE_S
        session.timer = asyncio.get_running_loop().call_later(patience_s, _expire, session)
        _observe(self.on_begun, session)

    def ended(self, session: RequestSession) -> None:
        self._sessions.discard(session)
        if session.timer is not None:
            session.timer.cancel()
        _observe(self.on_ended, session)

    async def recover(self, session: RequestSession, choices: tuple[int, ...], error: TailraceError) -> None:
        """Another pair for what was lost: the same seed and positions draw the same tokens."""
        try:
            while choices and not session.is_over:
                self._count_retry(session, choices, error)
                await asyncio.sleep(min(error.retry_after_s, max(0.0, session.remaining_s)))
                choices, error = self._restart(session, session.open_choices(choices), error)
        except TailraceError as final:
            session.fail(final)
        except Exception:
            log.exception("%s cannot be started again", session.wire_id)
            session.fail(InternalError("the gateway failed; its log says why"))

    def _restart(
        self, session: RequestSession, choices: tuple[int, ...], error: TailraceError
    ) -> tuple[tuple[int, ...], TailraceError]:
        """Start as many groups as there are workers for; gives back the choices that are left, and why."""
        for group in self._groups(session, choices):
            try:
                self._start(session, group, self._route(session.request, session.tokens(group[0])))
            except WorkerLostError as lost:
                return choices[choices.index(group[0]) :], lost
        return (), error

    def _count_retry(self, session: RequestSession, choices: tuple[int, ...], error: TailraceError) -> None:
        """Raises the error itself when there is no use or no time in trying again."""
        is_refusal = error.code is ErrorCode.OVERLOADED
        count = session.count_retry(choices, refused=is_refusal)
        if session.remaining_s <= error.retry_after_s:
            raise DeadlineExceededError(f"not done within its deadline; the last trouble was: {error.message}")
        if not error.retryable or count > (MAX_REFUSALS if is_refusal else MAX_RETRIES):
            raise error
        self.on_retry(error.code)

    def _groups(self, session: RequestSession, choices: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Choices that have begun have different tokens by now: each goes its own way."""
        if not choices:
            return []
        fresh = all(not session.released(c) for c in choices)
        is_range = choices == tuple(range(choices[0], choices[0] + len(choices)))
        return [choices] if fresh and is_range else [(c,) for c in choices]

    # -- routing ------------------------------------------------------------------------------------------------------

    def route(self, request: GenerationRequest) -> Route:
        return self._route(request, request.prompt_tokens)

    def _route(self, request: GenerationRequest, tokens: list[int]) -> Route:
        """For the prompt and what is replayed after it.

        Raises UnavailableError when there is no pair, InvalidRequestError when no pool can hold the tokens.
        """
        prefills = [member.view() for member in self._members.of(Role.PREFILL)]
        decodes = [member.view() for member in self._members.of(Role.DECODE)]
        if not decodes:
            raise UnavailableError("no decode worker is attached", retry_after_s=RETRY_AFTER_S)
        decode = self._members.get(decodes[0].worker_id)
        layout = decode.info.layout
        seed = chain_seed(decode.fingerprint, "", request.cache_salt)
        wanted = RouteRequest(
            len(tokens), layout.block_size, request.num_choices, decode.fingerprint, window=layout.window
        )
        route = self.router.route(
            wanted,
            self._chains.hash_blocks(tokens, layout.block_size, seed),
            prefills,
            decodes,
            bytes_per_token=layout.bytes_per_token,
            now_s=self._clock(),
            lenders=self._sourcing.lenders(),
            session=session_key(request.session_id, request.cache_salt),
        )
        if route is not None:
            return route
        # The router's own rule: the prompt, and a block to go on in.
        largest = max(view.total_blocks for view in decodes) - 1
        if 0 <= largest < wanted.num_prompt_blocks:
            most = largest * layout.block_size
            raise InvalidRequestError(f"{len(tokens)} tokens; the largest worker holds {most}", param="prompt")
        raise UnavailableError("no pair of workers can take requests now", retry_after_s=RETRY_AFTER_S)

    # -- submitting ---------------------------------------------------------------------------------------------------

    def _start(self, session: RequestSession, choices: tuple[int, ...], route: Route) -> None:
        """Both legs at once. Raises WorkerLostError when either worker has gone since it was chosen."""
        if not choices or session.is_over:
            return
        attempt = session.begin_attempt(choices)
        session.move(RequestState.ROUTED)
        session.move(RequestState.QUEUED)
        try:
            self._submit_legs(session, attempt, route)
        except BaseException:
            session.abandon(attempt)
            raise

    def _submit_legs(self, session: RequestSession, attempt: Attempt, route: Route) -> None:
        decode = self._members.get(route.decode_id)
        source, sources = None, self._sourcing.sources(route)
        if route.prefill_id is not None:
            prefill = self._members.get(route.prefill_id)
            source = self._source(session, attempt, prefill)
            attempt.prefill = Leg(session, attempt, prefill, self._members.new_handle(), Role.PREFILL)
            self._submit(session, attempt.prefill, ticket=source.ticket, prefix_sources=sources)
            sources = ()
        attempt.decode = Leg(session, attempt, decode, self._members.new_handle(), Role.DECODE)
        self._submit(session, attempt.decode, source=source, prefix_sources=sources)
        self._reserve(attempt.prefill or attempt.decode, route)

    def _reserve(self, leg: Leg, route: Route) -> None:
        """Counts the prefill in the next decision already, until its worker has computed it or the leg has ended."""
        worker_id, handle = leg.member.info.worker_id, leg.handle
        request = leg.session.request
        key = session_key(request.session_id, request.cache_salt)
        self.router.hold(route, handle, self._clock(), max(1, len(self._members.of(leg.role))), key)
        leg.member.on_computed(handle, lambda: self.router.release(worker_id, handle, self._clock()))

    def _source(self, session: RequestSession, attempt: Attempt, prefill: Member) -> KvSource:
        info = prefill.info
        ticket = sign_ticket(self._secret, session.wire_id, attempt.number, info.worker_id, info.epoch)
        return KvSource(info.worker_id, info.epoch, info.address, ticket)

    def _submit(
        self,
        session: RequestSession,
        leg: Leg,
        *,
        ticket: bytes = b"",
        source: KvSource | None = None,
        prefix_sources: tuple[PrefixSource, ...] = (),
    ) -> None:
        request, attempt = session.request, leg.attempt
        leg.member.submit(
            Submission(
                handle=leg.handle,
                request_id=session.wire_id,
                attempt=attempt.number,
                tokens=session.tokens(attempt.choices[0]),
                num_prompt_tokens=len(request.prompt_tokens),
                sampling=request.sampling,
                choices=attempt.choices,
                priority=request.priority,
                deadline_s=session.remaining_s,
                ticket=ticket,
                cache_salt=request.cache_salt,
                source=source,
                prefix_sources=prefix_sources,
                traceparent=session.traceparent,
                tracestate=session.tracestate,
            ),
            leg,
        )
        session.workers[leg.role].append(leg.member.info.worker_id)


def _expire(session: RequestSession) -> None:
    session.fail(DeadlineExceededError(f"not done within its deadline of {session.request.deadline_s:g} s"))


def _observe(hook: Callable[[RequestSession], None], session: RequestSession) -> None:
    """Whoever only watches must not fail a request."""
    try:
        hook(session)
    except Exception:
        log.exception("%s could not be observed", session.wire_id)

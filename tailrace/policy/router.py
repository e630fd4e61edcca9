"""Router: the state behind routing decisions, the same in a gateway and in the simulator. No clock, no sockets."""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import blake2b
from itertools import chain
from types import MappingProxyType
from typing import Any, Protocol

from tailrace.kv.events import Tier
from tailrace.policy.choosing import POLICIES, choose
from tailrace.policy.estimates import MAX_PREFILL_S, Crowding
from tailrace.policy.other_routers import (
    MAX_GIVEN,
    MAX_MARKS,
    NOTHING,
    Given,
    InFlight,
    OtherRouters,
    RouterNews,
    marks_of,
)
from tailrace.policy.reservations import Reservations
from tailrace.policy.routing import FetchWays, Held, Live, Route, RouteRequest, WorkerView
from tailrace.policy.sessions import SessionHints
from tailrace.policy.shortlist import Traits

LEAN_S = 1e-4
_NONE: Mapping[Any, Any] = MappingProxyType({})


class TierHit(Protocol):
    """Leading blocks that one holder has, and how many of them lie on each tier."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def by_tier(self) -> tuple[int, ...]: ...


class PrefixLookup(Protocol):
    """What a router asks of a prefix index."""

    def longest_prefix(self, hashes: Sequence[bytes]) -> dict[str, int]: ...

    def longest_prefix_by_tier(self, hashes: Sequence[bytes]) -> Mapping[str, TierHit]: ...

    def deepest_runs(self, hashes: Sequence[bytes], span: int) -> Mapping[str, TierHit]: ...


@dataclass(frozen=True, slots=True)
class Lenders:
    """Who lends what is cached, and how fast it is fetched."""

    ways: FetchWays
    can_lend: Callable[[str], bool] = lambda holder_id: True
    """Now. Asked of the few that hold something."""
    store_ids: frozenset[str] = frozenset()
    """Those that keep blocks on two tiers."""
    beside: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By worker id: stores on its own node."""


class Router:
    """Prices a request with what it has itself sent out, and remembers what it decides.

    >>> route = router.route(request, hashes, prefills, decodes, ...)
    >>> router.hold(route, handle, now_s, num_workers)    # at once: the next decision counts it
    >>> router.release(route.prefill_id, handle, now_s)    # computed, failed or cancelled
    """

    def __init__(self, index: PrefixLookup, policy: str = "cost") -> None:
        """Raises ValueError for a policy that is not one of POLICIES."""
        if policy not in POLICIES:
            raise ValueError(f"policy: must be one of {', '.join(POLICIES)}, got {policy!r}")
        self.policy = policy
        self._index = index
        self._reservations = Reservations()
        self._crowding = Crowding()
        self._sessions = SessionHints()
        self._traits = Traits()
        self._turn = 0
        self._others = OtherRouters()
        self._given: deque[Given] = deque(maxlen=MAX_GIVEN)
        self._num_workers = 1
        self._name = ""
        self._on_change: Callable[[], None] = lambda: None

    def route(
        self,
        request: RouteRequest,
        hashes: Sequence[bytes],
        prefills: Sequence[WorkerView],
        decodes: Sequence[WorkerView],
        *,
        bytes_per_token: int,
        now_s: float,
        lenders: Lenders | None = None,
        session: bytes = b"",
    ) -> Route | None:
        """None when there is no pair. Changes nothing.

        `session`: names the conversation that the request belongs to, if any does.
        """
        runs = self._index.deepest_runs(hashes, request.span) if request.window else None
        found = self._index.longest_prefix(hashes) if runs is None else _depths(runs)
        others = self._others.in_flight(now_s)
        live = Live(
            backlog_s=self._backlogs_s(prefills, others, now_s),
            # Where another router says what prompts it has sent, everything is known: nothing is beyond it.
            backlog_tokens=self._reservations.backlog_tokens()
            | {name: math.inf for name, there in others.items() if there.prefill_s or there.marks},
            waiting=self._crowding.waiting(),
            ways=lenders.ways if lenders is not None else None,
            held=self._held(found, runs, hashes, lenders) if lenders is not None else (),
            beside=lenders.beside if lenders is not None else _NONE,
            turn=self._turn,
            preferred=self._sessions.preferred(session) if session else None,
        )
        hits = self._others.extend(self._reservations.extend(found, hashes), hashes)
        if session:
            self._sessions.expect(session, hashes, hits, now_s)
        prefills, decodes = _with_others(prefills, others), _with_others(decodes, others)
        route = choose(
            request,
            prefills,
            decodes,
            hits,
            bytes_per_token,
            live=live,
            policy=self.policy,
            traits=self._traits,
        )
        if route is None:
            return None
        is_named = not request.fingerprint or _view(decodes, route.decode_id).fingerprint == request.fingerprint
        return replace(
            route,
            hashes=tuple(hashes) if is_named else (),
            known_blocks=max(hits.values(), default=0) if is_named else 0,
            num_prompt_tokens=request.num_prompt_tokens,
            is_measured=any(0.0 < view.prefill_tokens_per_s < math.inf for view in chain(prefills, decodes)),
        )

    def _held(
        self, found: Mapping[str, int], runs: Mapping[str, TierHit] | None, hashes: Sequence[bytes], lenders: Lenders
    ) -> list[Held]:
        """Of those that lend: the stores' tiers are asked for only where a store holds something.

        `runs`: `found` with tiers, where that is known already.
        """
        stores = lenders.store_ids
        held = [
            Held(holder, depth) for holder, depth in found.items() if holder not in stores and lenders.can_lend(holder)
        ]
        if not stores.isdisjoint(found):
            tiers = self._index.longest_prefix_by_tier(hashes) if runs is None else runs
            held += [
                Held(holder, hit.num_blocks, is_store=True, on_disk=hit.by_tier[Tier.NVME])
                for holder, hit in tiers.items()
                if holder in stores
            ]
        return held

    def hold(self, route: Route, handle: int, now_s: float, num_workers: int, session: bytes = b"") -> None:
        """The request was sent where `route` says; one of `num_workers` prefills it."""
        worker_id = route.prefill_id or route.decode_id
        chosen = route.chosen
        held_s = min(chosen.fetch_s + chosen.prefill_s, MAX_PREFILL_S)
        self._turn += 1
        self._num_workers = num_workers
        self._reservations.hold(worker_id, handle, route.hashes, held_s, now_s, route.num_prompt_tokens)
        if session:
            self._sessions.sent(session, route, now_s)
        if route.is_measured:
            # A neutral rate may be a hundredfold off, and would be remembered as load for hundreds of requests.
            self._crowding.add(worker_id, chosen.prefill_s, now_s, num_workers)
            self._given.append(Given(worker_id, chosen.prefill_s))
        self._on_change()

    def release(self, worker_id: str, handle: int, now_s: float) -> None:
        self._reservations.release(worker_id, handle, now_s)
        self._on_change()

    def _backlogs_s(
        self, prefills: Sequence[WorkerView], others: Mapping[str, InFlight], now_s: float
    ) -> Mapping[str, float]:
        """Of those that have one, and of all who prefill where there are other routers."""
        backlogs = self._reservations.backlogs_s(now_s)
        for worker_id, there in others.items():
            backlogs[worker_id] = backlogs.get(worker_id, 0.0) + there.prefill_s
        if self._name:
            for view in prefills:
                backlogs[view.worker_id] = backlogs.get(view.worker_id, 0.0) + _lean_s(self._name, view.worker_id)
        return backlogs

    # -- several routers over the same workers ------------------------------------------------------------------------

    def share(self, name: str, on_change: Callable[[], None]) -> None:
        """There are others, among whom it has this name. `on_change` is called when there is news for them."""
        self._name, self._on_change = name, on_change

    def news(self, unreported: Mapping[str, InFlight], now_s: float) -> RouterNews:
        """What others should count. `unreported`: tokens and sequences that no load report can know yet, by worker id.

        What was sent since is told once: the next call begins anew.
        """
        given, marks = tuple(self._given), self._marks()
        self._given.clear()
        in_flight = dict(unreported)
        for worker_id in self._reservations.worker_ids():
            beside = in_flight.get(worker_id, NOTHING)
            backlog_s = self._reservations.backlog_s(worker_id, now_s)
            in_flight[worker_id] = replace(beside, prefill_s=backlog_s, marks=frozenset(marks.get(worker_id, ())))
        return RouterNews(in_flight, given)

    def hear(self, router_id: str, news: RouterNews, now_s: float, ttl_s: float) -> None:
        """News of another router: counts in every price for `ttl_s`, or until its next."""
        self._others.hear(router_id, news.in_flight, now_s + ttl_s)
        for given in news.given:
            self._crowding.add(given.worker_id, given.prefill_s, now_s, self._num_workers)

    def num_others(self, now_s: float) -> int:
        """Routers that have something in flight, or said so a moment ago."""
        return self._others.num_heard(now_s)

    def _marks(self) -> dict[str, list[bytes]]:
        """By worker id, MAX_MARKS at most."""
        marks: dict[str, list[bytes]] = {}
        num_marks = 0
        for worker_id, hashes in self._reservations.newest():
            if num_marks >= MAX_MARKS:
                break
            told = marks_of(hashes)[: MAX_MARKS - num_marks]
            marks.setdefault(worker_id, []).extend(told)
            num_marks += len(told)
        return marks


def _depths(hits: Mapping[str, TierHit]) -> dict[str, int]:
    return {holder: hit.num_blocks for holder, hit in hits.items()}


def _view(views: Sequence[WorkerView], worker_id: str) -> WorkerView:
    return next(view for view in views if view.worker_id == worker_id)


@lru_cache(maxsize=1 << 12)
def _lean_s(router: str, worker_id: str) -> float:
    """Who knows the same would choose the same of equal workers: each router leans a little another way."""
    return LEAN_S * blake2b(f"{router} {worker_id}".encode(), digest_size=1).digest()[0] / 256


def _with_others(views: Sequence[WorkerView], others: Mapping[str, InFlight]) -> Sequence[WorkerView]:
    """With what other routers have sent and no load report knows."""
    if not others:
        return views
    found = list(views)
    for at, view in enumerate(views):
        there = others.get(view.worker_id)
        if there is not None and (there.tokens or there.sequences):
            tokens, sequences = view.reserved_tokens + there.tokens, view.reserved_sequences + there.sequences
            found[at] = replace(view, reserved_tokens=tokens, reserved_sequences=sequences)
    return found

"""Router: the state behind routing decisions, the same in a gateway and in the simulator. No clock, no sockets."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b
from types import MappingProxyType
from typing import Any, Protocol

from tailrace.policy.estimates import Crowding
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
from tailrace.policy.routing import POLICIES, Live, Route, RouteRequest, WorkerView, choose

LEAN_S = 1e-4
_NONE: Mapping[Any, Any] = MappingProxyType({})


class PrefixLookup(Protocol):
    """What a router asks of a prefix index."""

    def longest_prefix(self, hashes: Sequence[bytes]) -> dict[str, int]: ...


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
        pair_bytes_per_s: Mapping[tuple[str, str], float],
        bytes_per_token: int,
        now_s: float,
        fetch_bytes_per_s: Mapping[tuple[str, str], float] = _NONE,
        beside: Mapping[str, Sequence[str]] = _NONE,
    ) -> Route | None:
        """None when there is no pair. Changes nothing. For the mappings see `choose` and `Live`."""
        held = self._index.longest_prefix(hashes)
        others = self._others.in_flight(now_s)
        live = Live(
            backlog_s={view.worker_id: self._backlog_s(view.worker_id, others, now_s) for view in prefills},
            waiting=self._crowding.waiting(),
            fetch_bytes_per_s=fetch_bytes_per_s,
            fetchable=held,
            beside=beside,
            turn=self._turn,
        )
        hits = self._others.extend(self._reservations.extend(held, hashes), hashes)
        prefills, decodes = _with_others(prefills, others), _with_others(decodes, others)
        route = choose(
            request, prefills, decodes, hits, pair_bytes_per_s, bytes_per_token, live=live, policy=self.policy
        )
        return replace(route, hashes=tuple(hashes)) if route is not None else None

    def hold(self, route: Route, handle: int, now_s: float, num_workers: int) -> None:
        """The request was sent where `route` says; one of `num_workers` prefills it."""
        worker_id = route.prefill_id or route.decode_id
        chosen = route.chosen
        self._turn += 1
        self._num_workers = num_workers
        self._crowding.add(worker_id, chosen.prefill_s, now_s, num_workers)
        self._reservations.hold(worker_id, handle, route.hashes, chosen.fetch_s + chosen.prefill_s, now_s)
        self._given.append(Given(worker_id, chosen.prefill_s))
        self._on_change()

    def release(self, worker_id: str, handle: int, now_s: float) -> None:
        self._reservations.release(worker_id, handle, now_s)
        self._on_change()

    def _backlog_s(self, worker_id: str, others: Mapping[str, InFlight], now_s: float) -> float:
        backlog_s = self._reservations.backlog_s(worker_id, now_s) + others.get(worker_id, NOTHING).prefill_s
        return backlog_s + (_lean_s(self._name, worker_id) if self._name else 0.0)

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

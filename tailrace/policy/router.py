"""Router: the state behind routing decisions, the same in a gateway and in the simulator. No clock, no sockets."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Protocol

from tailrace.policy.estimates import Crowding
from tailrace.policy.reservations import Reservations
from tailrace.policy.routing import POLICIES, Live, Route, RouteRequest, WorkerView, choose

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
        live = Live(
            backlog_s={view.worker_id: self._reservations.backlog_s(view.worker_id, now_s) for view in prefills},
            waiting=self._crowding.waiting(),
            fetch_bytes_per_s=fetch_bytes_per_s,
            fetchable=held,
            beside=beside,
            turn=self._turn,
        )
        hits = self._reservations.extend(held, hashes)
        route = choose(
            request, prefills, decodes, hits, pair_bytes_per_s, bytes_per_token, live=live, policy=self.policy
        )
        return replace(route, hashes=tuple(hashes)) if route is not None else None

    def hold(self, route: Route, handle: int, now_s: float, num_workers: int) -> None:
        """The request was sent where `route` says; one of `num_workers` prefills it."""
        worker_id = route.prefill_id or route.decode_id
        chosen = route.chosen
        self._turn += 1
        self._crowding.add(worker_id, chosen.prefill_s, now_s, num_workers)
        self._reservations.hold(worker_id, handle, route.hashes, chosen.fetch_s + chosen.prefill_s, now_s)

    def release(self, worker_id: str, handle: int, now_s: float) -> None:
        self._reservations.release(worker_id, handle, now_s)

"""Router: the state behind routing decisions, the same in a gateway and in the simulator. No clock, no sockets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol

from tailrace.kv.events import Tier
from tailrace.policy.choosing import POLICIES, choose
from tailrace.policy.estimates import Crowding
from tailrace.policy.reservations import Reservations
from tailrace.policy.routing import FetchWays, Held, Live, Route, RouteRequest, WorkerView
from tailrace.policy.sessions import SessionHints

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


@dataclass(frozen=True, slots=True)
class Lenders:
    """Who lends what is cached, and how fast it is fetched."""

    ways: FetchWays
    holder_ids: frozenset[str] | None = None
    """Of those that can lend now; None: everybody of whom the index knows."""
    store_ids: frozenset[str] = frozenset()
    """Those of them that keep blocks on two tiers."""
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
        self._turn = 0

    def route(
        self,
        request: RouteRequest,
        hashes: Sequence[bytes],
        prefills: Sequence[WorkerView],
        decodes: Sequence[WorkerView],
        *,
        bytes_per_token: int,
        now_s: float,
        pair_bytes_per_s: Mapping[tuple[str, str], float] = _NONE,
        lenders: Lenders | None = None,
        session: bytes = b"",
    ) -> Route | None:
        """None when there is no pair. Changes nothing.

        `pair_bytes_per_s`: see `choose`. `session`: names the conversation that the request belongs to, if any does.
        """
        found = self._index.longest_prefix(hashes)
        live = Live(
            backlog_s=self._reservations.backlogs_s(now_s),
            waiting=self._crowding.waiting(),
            ways=lenders.ways if lenders is not None else None,
            held=self._held(found, hashes, lenders) if lenders is not None else (),
            beside=lenders.beside if lenders is not None else _NONE,
            turn=self._turn,
            preferred=self._sessions.preferred(session) if session else None,
        )
        hits = self._reservations.extend(found, hashes)
        if session:
            self._sessions.expect(session, hashes, hits, now_s)
        route = choose(
            request, prefills, decodes, hits, pair_bytes_per_s, bytes_per_token, live=live, policy=self.policy
        )
        if route is None:
            return None
        return replace(route, hashes=tuple(hashes), known_blocks=max(hits.values(), default=0))

    def _held(self, found: Mapping[str, int], hashes: Sequence[bytes], lenders: Lenders) -> list[Held]:
        """Of those that lend: the stores' tiers are asked for only where a store holds something."""
        allowed, stores = lenders.holder_ids, lenders.store_ids
        held = [
            Held(holder, depth)
            for holder, depth in found.items()
            if (allowed is None or holder in allowed) and holder not in stores
        ]
        if not stores.isdisjoint(found):
            tiers = self._index.longest_prefix_by_tier(hashes)
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
        self._turn += 1
        self._crowding.add(worker_id, chosen.prefill_s, now_s, num_workers)
        self._reservations.hold(worker_id, handle, route.hashes, chosen.fetch_s + chosen.prefill_s, now_s)
        if session:
            self._sessions.sent(session, route, now_s)

    def release(self, worker_id: str, handle: int, now_s: float) -> None:
        self._reservations.release(worker_id, handle, now_s)

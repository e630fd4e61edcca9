"""Prefixes that others hold: who can lend them, how fast each pair of workers has been, and whom a submission names."""

from collections.abc import Callable, Sequence

from services.gateway.members import Member, Members
from tailrace.errors import WorkerLostError
from tailrace.kv.events import Tier
from tailrace.messages import Fetch, KvSource, LegReport, PrefixSource
from tailrace.policy.fetching import FetchRates
from tailrace.policy.router import Lenders
from tailrace.policy.routing import Route
from tailrace.types import Role


class Sourcing:
    """Event loop only."""

    def __init__(self, members: Members, clock: Callable[[], float]) -> None:
        self._members = members
        self._clock = clock
        self._rates = FetchRates()
        members.on_report = self._learn
        members.on_rates = self._rates.told

    def lenders(self) -> Lenders:
        """Whoever drains or is lost lends nothing."""
        self._rates.advance(self._clock())
        stores = [member for member in self._members.of(Role.KVSTORE) if not member.load.draining]
        store_ids = frozenset(member.info.worker_id for member in stores)
        return Lenders(self._rates, self._can_lend, store_ids, self._beside(stores))

    def _can_lend(self, worker_id: str) -> bool:
        try:
            holder = self._members.get(worker_id)
        except WorkerLostError:
            return False
        return not holder.is_lost and not holder.load.draining

    def _beside(self, stores: Sequence[Member]) -> dict[str, list[str]]:
        """Stores by the workers whose host is theirs too."""
        if not stores:
            return {}
        by_host: dict[str, list[str]] = {}
        for store in stores:
            by_host.setdefault(_host(store), []).append(store.info.worker_id)
        workers = [*self._members.of(Role.PREFILL), *self._members.of(Role.DECODE)]
        return {worker.info.worker_id: by_host[_host(worker)] for worker in workers if _host(worker) in by_host}

    def sources(self, route: Route) -> tuple[PrefixSource, ...]:
        """In the route's order. Each is said to hold all from the prompt's first block on, which it is, or with
        a window what is needed of it.

        A block that two claim is asked of the first and, where that fails, of the other; a needer that has dropped
        blocks of its own meanwhile finds them there too.
        """
        sources: list[PrefixSource] = []
        for piece in route.sources:
            try:
                holder = self._members.get(piece.holder_id)
            except WorkerLostError:
                continue
            if not holder.is_lost:
                info = holder.info
                source = KvSource(info.worker_id, info.epoch, info.address, b"")
                sources.append(PrefixSource(source, 0, piece.first_block + piece.num_blocks))
        return tuple(sources)

    def _learn(self, needer: Member, report: LegReport) -> None:
        needer_id = needer.info.worker_id
        for fetch in report.fetches:
            if fetch.num_asked > 0 and fetch.num_blocks == 0:
                self._rates.failed(fetch.holder_id, needer_id, self._clock())
            elif (tier := self._tier(fetch, report)) is not None:
                self._rates.succeeded(fetch.holder_id, needer_id, tier, fetch.num_bytes, fetch.seconds)

    def _tier(self, fetch: Fetch, report: LegReport) -> Tier | None:
        """Where most of it was. A report counts the tiers of all its prompt's fetches together.

        None: it was not for a prompt. What a sequence that gave way got back from a store is in no tier's count.
        """
        if not any(store.info.worker_id == fetch.holder_id for store in self._members.of(Role.KVSTORE)):
            return Tier.WORKER
        on_disk, in_memory = report.cached_by_tier.get("nvme", 0), report.cached_by_tier.get("cpu", 0)
        if not on_disk and not in_memory:
            return None
        return Tier.NVME if on_disk > in_memory else Tier.CPU


def _host(member: Member) -> str:
    return member.info.address.rpartition(":")[0]

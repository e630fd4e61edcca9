"""Fetches of prefixes under virtual time: who is asked for what, when a holder answers, and when it is too late.

As between workers: a holder that computes answers between two of its steps, a worker lends a tenth of its pool at a
time, and a needer that has waited for as long as computing would take computes what has not come.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from tailrace.kv.block_pool import BlockPool, RevocableLoan
from tailrace.kv.events import Tier
from tailrace.policy.estimates import PrefillFit
from tailrace.policy.fetching import FetchRates, patience_s
from tailrace.policy.prefix_fetches import PrefixFetch
from tailrace.policy.routing import PrefixRange, Way
from tailrace.sim.decode import DecodeNode
from tailrace.sim.network import Network
from tailrace.sim.prefill import FetchedShare, PrefillJob, PrefillNode
from tailrace.sim.profile import HardwareProfile
from tailrace.sim.store import StoreTier

TIERS = ("worker", "decode", "cpu", "nvme")
"""Where a fetched block may come from: memory of another prefill worker, of a decode worker or of a store, a disk."""
POOL_SHARE = 10
"""A worker lends at most one block of its pool in so many at a time, as `tailrace.worker.cached_lending` does."""
_KINDS = {"worker": Tier.WORKER, "decode": Tier.WORKER, "cpu": Tier.CPU, "nvme": Tier.NVME}
_KNOWN_BYTES = (1 << 20, 1 << 30)
Act = Callable[[float], None]


class Needer(Protocol):
    """A worker that fetches what it is about to compute after."""

    @property
    def worker_id(self) -> str: ...

    @property
    def block_tokens(self) -> int: ...

    @property
    def fit(self) -> PrefillFit: ...

    def drain_granted(self) -> Sequence[tuple[PrefillJob, PrefixFetch]]: ...

    def landed(self, fetch: PrefixFetch, blocks: Sequence[int]) -> None: ...

    def end_fetch(self, job: PrefillJob, fetch: PrefixFetch, shares: Sequence[FetchedShare], tier: str) -> None: ...


@dataclass(slots=True, eq=False)
class _Share:
    """What one holder is asked for: `places` in the chain."""

    holder_id: str
    places: range
    asked_s: float
    num_landed: int = 0
    ended_s: float = 0.0
    is_reading: bool = False
    is_over: bool = False

    @property
    def missing(self) -> range:
        return self.places[self.num_landed :]


@dataclass(slots=True, eq=False)
class _Pull:
    """One request's prefix."""

    job: PrefillJob
    needer: Needer
    fetch: PrefixFetch
    shares: list[_Share] = field(default_factory=list)
    is_late: bool = False


@dataclass(frozen=True, slots=True)
class Holders:
    """Everybody who can lend, by id."""

    prefills: Mapping[str, PrefillNode]
    decodes: Mapping[str, DecodeNode]
    tiers: Mapping[str, StoreTier]

    def tier_of(self, holder_id: str) -> str:
        """One of TIERS; a store's tier is named after its node."""
        return "decode" if holder_id in self.decodes else holder_id.partition("/")[2] or "worker"


class LearntWays:
    """FetchWays as a gateway learns them: from what the fetches of computed prompts took."""

    def __init__(self, holders: Holders) -> None:
        self._rates = FetchRates()
        self._holders = holders

    def way(self, holder_id: str, needer_id: str, tier: Tier) -> Way | None:
        return self._rates.way(holder_id, needer_id, self._kind(holder_id))

    def know(self, profile: HardwareProfile) -> None:
        """What idle holders take, as a gateway that has run for a while has measured it."""
        rates = {Tier.WORKER: profile.link_bytes_per_s, Tier.CPU: profile.host_bytes_per_s}
        for kind, rate in {**rates, Tier.NVME: profile.nvme_bytes_per_s}.items():
            for num_bytes in _KNOWN_BYTES:
                seconds = profile.fetch_overhead_s + num_bytes / rate
                self._rates.succeeded("before", "before", kind, num_bytes, seconds)

    def advance(self, now_s: float) -> None:
        self._rates.advance(now_s)

    def learn(self, needer_id: str, share: FetchedShare, block_bytes: int, now_s: float) -> None:
        if not share.num_blocks:
            self._rates.failed(share.holder_id, needer_id, now_s)
            return
        kind, num_bytes = self._kind(share.holder_id), share.num_blocks * block_bytes
        self._rates.succeeded(share.holder_id, needer_id, kind, num_bytes, share.seconds)

    def _kind(self, holder_id: str) -> Tier:
        return _KINDS[self._holders.tier_of(holder_id)]


class Fetching:
    """Event loop: `begin` after each report of a worker."""

    def __init__(
        self,
        holders: Holders,
        profile: HardwareProfile,
        block_bytes: int,
        *,
        at: Callable[[float, Act], None],
        wake: Callable[[str, float], None],
        slowdown: Callable[[float], float] = lambda now_s: 1.0,
    ) -> None:
        """`at` puts an event in line; `wake`: blocks of that worker's pool, or its fetches, may let it go on.

        `slowdown`: how many times as long as between idle workers a fetch takes whose read begins at that time: asking,
        answering and copying are work of the workers' processes.
        """
        self._holders = holders
        self._profile = profile
        self._block_bytes = block_bytes
        self._at = at
        self._wake = wake
        self._slowdown = slowdown
        self._network = Network()

    def begin(self, needer: Needer, now_s: float) -> None:
        """What its scheduler has given room to since the last call."""
        for job, fetch in needer.drain_granted():
            pull = _Pull(job, needer, fetch)
            pull.shares += _shares(job.sources, fetch, now_s)
            tokens = needer.block_tokens
            patience = patience_s(needer.fit.seconds(fetch.num_local * tokens, fetch.end * tokens))
            self._at(now_s + patience, partial(self._run_out, pull))
            for share in pull.shares:
                self._ask(pull, share, now_s)

    def _ask(self, pull: _Pull, share: _Share, now_s: float) -> None:
        self._tell(share.holder_id, partial(self._lend, pull, share), now_s)

    def _tell(self, worker_id: str, command: Act, now_s: float) -> None:
        """At once, or when the step that it computes is over; a store computes nothing."""
        if worker_id in self._holders.prefills:
            self._holders.prefills[worker_id].tell(command, now_s)
        elif worker_id in self._holders.decodes:
            self._at(self._holders.decodes[worker_id].answers_at_s(now_s), command)
        else:
            command(now_s)

    def _lend(self, pull: _Pull, share: _Share, now_s: float) -> None:
        """The holder lends what it really has, and the needer begins to read."""
        if share.is_over:
            return
        names = pull.job.request.hashes[share.missing.start : share.missing.stop]
        loan: RevocableLoan | None = None
        if (tier := self._holders.tiers.get(share.holder_id)) is not None:
            num_found = num_lent = tier.longest_prefix(names)
        else:
            pool = self._pool(share.holder_id)
            found = pool.find_prefix(names)
            loan = pool.lend_revocably(found[: max(1, pool.num_blocks // POOL_SHARE)], lambda: None)
            num_found, num_lent = len(found), len(loan.blocks)
        if not num_lent:
            self._over(pull, share, now_s)
            return
        share.is_reading = True
        slowdown = self._slowdown(now_s)
        end_s = self._network.transfer(
            share.holder_id,
            pull.needer.worker_id,
            num_lent * self._block_bytes,
            self._rate(share.holder_id, pull.needer.worker_id) / slowdown,
            now_s + slowdown * self._profile.fetch_overhead_s,
        )
        has_more = num_lent < num_found
        self._at(end_s, partial(self._read, pull, share, loan, num_lent, has_more))

    def _read(
        self, pull: _Pull, share: _Share, loan: RevocableLoan | None, num_blocks: int, has_more: bool, now_s: float
    ) -> None:
        share.is_reading = False
        share.ended_s = now_s
        was_revoked = loan is not None and loan.is_over
        if loan is not None:
            self._pool(share.holder_id).end_loan(loan)
            self._wake(share.holder_id, now_s)
        if not was_revoked:
            places = share.missing[:num_blocks]
            share.num_landed += num_blocks
            self._tell(pull.needer.worker_id, partial(self._landed, pull, places), now_s)
        if has_more and not was_revoked and not pull.is_late:
            self._ask(pull, share, now_s)
        else:
            self._over(pull, share, now_s)

    def _landed(self, pull: _Pull, places: range, now_s: float) -> None:
        pull.needer.landed(pull.fetch, [pull.fetch.blocks[place] for place in places])

    def _run_out(self, pull: _Pull, now_s: float) -> None:
        """Who has not answered is waited for no more. A read that has begun is, for it could still write."""
        pull.is_late = True
        for share in pull.shares:
            if not share.is_reading and not share.is_over:
                self._over(pull, share, now_s)

    def _over(self, pull: _Pull, share: _Share, now_s: float) -> None:
        share.is_over = True
        share.ended_s = now_s
        if all(other.is_over for other in pull.shares):
            self._tell(pull.needer.worker_id, partial(self._ended, pull), now_s)

    def _ended(self, pull: _Pull, now_s: float) -> None:
        found = [FetchedShare(s.holder_id, s.num_landed, s.ended_s - s.asked_s) for s in pull.shares]
        most = max(found, key=lambda share: share.num_blocks)
        pull.needer.end_fetch(pull.job, pull.fetch, found, self._holders.tier_of(most.holder_id))
        self._wake(pull.needer.worker_id, now_s)

    def _pool(self, worker_id: str) -> BlockPool:
        holders = self._holders
        return (holders.decodes[worker_id] if worker_id in holders.decodes else holders.prefills[worker_id]).pool

    def _rate(self, holder_id: str, needer_id: str) -> float:
        """Bytes a second of the slowest part of the way."""
        profile = self._profile
        tier = self._holders.tier_of(holder_id)
        if tier not in ("cpu", "nvme"):
            return profile.link_bytes_per_s
        rate = profile.host_bytes_per_s if tier == "cpu" else profile.nvme_bytes_per_s
        is_near = holder_id.partition("/")[0] == needer_id
        return rate if is_near else min(rate, profile.link_bytes_per_s)


def _shares(sources: Sequence[PrefixRange], fetch: PrefixFetch, now_s: float) -> Iterator[_Share]:
    """Each is said to hold all blocks up to its last one; what two claim is asked of the first."""
    place = fetch.num_local
    for source in sources:
        stop = min(source.first_block + source.num_blocks, fetch.end)
        if stop > place:
            yield _Share(source.holder_id, range(place, stop), now_s)
            place = stop

"""The simulation: arrivals, routing by the product's Router, prefill, fetches, decode, one event after another.

Events at one instant happen in the order in which they were scheduled, so a run depends on its inputs alone.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from tailrace.index.memory import MemoryIndex
from tailrace.index.prefix_index import PrefixIndex
from tailrace.policy.eviction import EVICTIONS
from tailrace.policy.router import Lenders, Router
from tailrace.policy.routing import RouteRequest, WorkerView
from tailrace.sim.decode import DecodeJob, DecodeNode
from tailrace.sim.fetching import TIERS, Fetching, Holders, LearntWays
from tailrace.sim.prefill import LAYOUT, PrefillJob, PrefillNode
from tailrace.sim.profile import HardwareProfile
from tailrace.sim.store import StoreTier
from tailrace.sim.workload import SimRequest, Workload
from tailrace.types import Role

UNLIMITED = "unlimited"
"""The decode worker that stands for as many as are needed."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast the machine is from a time on: steps take so many times as long as the profile says."""

    from_s: float
    prefill: float = 1.0
    decode: float = 1.0


_AS_PROMISED = Pace(0.0)


@dataclass(frozen=True, slots=True)
class SimOptions:
    num_workers: int
    profile: HardwareProfile
    num_decode: int | None = None
    """None: as many as are needed, so that every sequence decodes alone."""
    blocks_per_worker: int = 20_000
    decode_blocks: int | None = None
    """Of each decode worker; None: as many as a prefill worker has."""
    decode_max_num_seqs: int = 256
    policy: str = "cost"
    fetch: bool = True
    """Prefixes may be fetched from other workers and from stores."""
    knows_rates: bool = True
    """The router has seen fetches before; otherwise it begins as one does that was just started."""
    cpu_blocks: int = 0
    """Of the CPU tier of each worker's node."""
    nvme_blocks: int = 0
    store_eviction: str = "greedy-dual"
    stepwise_decode: bool = False
    paces: Sequence[Pace] = ()
    """In the order of their times; before the first one the profile holds."""


@dataclass(slots=True, eq=False)
class RequestRecord:
    """What became of one request. Times in seconds of virtual time; NaN for what did not happen."""

    request: SimRequest
    worker_id: str = ""
    """Who prefilled it; empty: nobody could."""
    hit_tokens: int = 0
    fetched_tokens: int = 0
    tier: str = ""
    is_local: bool = False
    """A decode worker prefilled."""
    prefill_s: float = float("nan")
    """From the step that admitted it to the one that computed its last token."""
    first_token_s: float = float("nan")
    finished_s: float = float("nan")

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.request.arrival_s

    @property
    def tpot_s(self) -> float:
        return (self.finished_s - self.first_token_s) / max(1, self.request.num_output_tokens - 1)


@dataclass(slots=True)
class Outcome:
    records: list[RequestRecord] = field(default_factory=list)
    busy_s: list[float] = field(default_factory=list)
    """Prefill seconds of each worker."""
    least_ttft_s: list[float] = field(default_factory=list)
    """Of each request: no queue, and without a fetch all that one infinite cache would have, answers included."""
    tiers: tuple[str, ...] = TIERS


class Simulator:
    def __init__(self, workload: Workload, options: SimOptions, index: PrefixIndex | None = None) -> None:
        self._workload = workload
        self._options = options
        self._profile = options.profile
        largest = max(options.blocks_per_worker, options.decode_blocks or 0, options.cpu_blocks, options.nvme_blocks)
        self._index = MemoryIndex(largest) if index is None else index
        self._router = Router(self._index, options.policy)
        width = len(str(options.num_workers - 1))
        names = [f"p{number:0{width}}" for number in range(options.num_workers)]
        self._prefills = {
            name: PrefillNode(name, options.blocks_per_worker, workload.block_tokens, options.profile) for name in names
        }
        self._decodes = self._make_decodes()
        self._stores = {name: self._make_store(name) for name in names} if options.fetch else {}
        tiers = {tier.holder_id: tier for store in self._stores.values() for tier in store}
        self._holders = Holders(self._prefills, self._decodes, tiers)
        self._block_bytes = workload.block_tokens * options.profile.kv_bytes_per_token
        self._fetching = Fetching(
            self._holders,
            options.profile,
            self._block_bytes,
            at=self._at,
            wake=self._wake,
            slowdown=self._host_slowdown,
        )
        self._ways = LearntWays(self._holders)
        if options.knows_rates:
            self._ways.know(options.profile)
        beside = {name: [tier.holder_id for tier in store] for name, store in self._stores.items()}
        self._lenders = Lenders(self._ways, beside=beside) if options.fetch else None
        self._records = [RequestRecord(request) for request in workload.requests]
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = count()
        self._versions = dict.fromkeys(self._decodes, 0)

    def run(self) -> Outcome:
        for number, record in enumerate(self._records):
            self._at(record.request.arrival_s, partial(self._arrive, number))
        while self._events:
            now_s, _, act = heapq.heappop(self._events)
            act(now_s)
        return Outcome(self._records, [node.busy_s for node in self._prefills.values()], self._least_ttft_s())

    def _least_ttft_s(self) -> list[float]:
        hits = self._workload.oracle_hits(answers=True)
        return [
            self._profile.request_overhead_s + self._profile.prefill_s(hit, request.num_prompt_tokens)
            for request, hit in zip(self._workload.requests, hits, strict=True)
        ]

    # -- setting up ---------------------------------------------------------------------------------------------------

    def _make_decodes(self) -> dict[str, DecodeNode]:
        options = self._options
        return {
            f"d{number}": DecodeNode(
                f"d{number}",
                options.decode_blocks or options.blocks_per_worker,
                options.decode_max_num_seqs,
                options.profile,
                block_tokens=self._workload.block_tokens,
                stepwise=options.stepwise_decode,
            )
            for number in range(options.num_decode or 0)
        }

    def _make_store(self, name: str) -> list[StoreTier]:
        """The tiers that there are on one worker's node, the upper one first."""
        tiers: list[StoreTier] = []
        for kind, num_blocks in (("nvme", self._options.nvme_blocks), ("cpu", self._options.cpu_blocks)):
            if num_blocks:
                order = EVICTIONS[self._options.store_eviction]()
                tiers.insert(0, StoreTier(f"{name}/{kind}", num_blocks, order, tiers[0] if tiers else None))
        return tiers

    def _decode_views(self, now_s: float) -> list[WorkerView]:
        if self._decodes:
            return [node.view(now_s) for node in self._decodes.values()]
        profile = self._profile
        unlimited = WorkerView(
            UNLIMITED,
            Role.DECODE,
            LAYOUT,
            decode_step_s=profile.step_base_s,
            transfer_bytes_per_s=profile.link_bytes_per_s,
            max_num_seqs=1 << 30,
        )
        return [unlimited]

    # -- events -------------------------------------------------------------------------------------------------------

    def _at(self, when_s: float, act: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._order), act))

    def _arrive(self, number: int, now_s: float) -> None:
        record = self._records[number]
        request = record.request
        self._ways.advance(now_s)
        route = self._router.route(
            # Nobody's batch would be held up by prompts of as many decode workers as are needed.
            RouteRequest(request.num_prompt_tokens, self._workload.block_tokens, local_prefill=bool(self._decodes)),
            request.hashes,
            [node.view() for node in self._prefills.values()],
            self._decode_views(now_s),
            lenders=self._lenders,
            bytes_per_token=self._profile.kv_bytes_per_token,
            now_s=now_s,
        )
        if route is None:
            return
        record.worker_id, record.is_local = route.prefill_id or route.decode_id, route.prefill_id is None
        job = PrefillJob(number, request, route.decode_id, route.sources)
        self._router.hold(route, number, now_s, len(self._decodes if record.is_local else self._prefills))
        if record.is_local:
            local = self._decodes[route.decode_id]
            local.accept_local(job, self._decode_job(local, job), now_s)
            self._plan(local, now_s)
        else:
            node = self._prefills[record.worker_id]
            node.tell(lambda _: node.accept(job), now_s)
            self._start(node, now_s)

    def _wake(self, worker_id: str, now_s: float) -> None:
        """Something that it waits for may be there."""
        if worker_id in self._decodes:
            self._decodes[worker_id].wake()
            self._plan(self._decodes[worker_id], now_s)
        else:
            self._start(self._prefills[worker_id], now_s)

    def _start(self, node: PrefillNode, now_s: float) -> None:
        if node.is_computing:
            return
        seconds = node.start(now_s, self._pace(now_s).prefill * self._slowdown(node, now_s))
        if seconds is None:
            self._report(node, now_s)
            self._share_cores(now_s)
        else:
            self._at(now_s + seconds, partial(self._stepped, node))
            self._share_cores(now_s)

    def _host_slowdown(self, now_s: float) -> float:
        """Of what processes do for one another beside the steps: it takes its turn on the same cores."""
        return self._pace(now_s).prefill * self._slowdown(None, now_s)

    def _slowdown(self, node: PrefillNode | DecodeNode | None, now_s: float) -> float:
        """Of a step that begins now, by who else computes; None: of something that no worker computes."""
        profile = self._profile
        if not (profile.contention or profile.cores):
            return 1.0
        others = sum(other.is_computing for other in self._prefills.values() if other is not node)
        share = min(1.0, others / max(1, len(self._prefills) - 1))
        busy = 1 + others + sum(other.is_computing for other in self._decodes.values() if other is not node)
        return (1.0 + profile.contention * share) * (max(1.0, busy / profile.cores) if profile.cores else 1.0)

    def _pace(self, now_s: float) -> Pace:
        return next((pace for pace in reversed(self._options.paces) if pace.from_s <= now_s), _AS_PROMISED)

    def _share_cores(self, now_s: float) -> None:
        """Decode workers' steps are many in one event: whoever begins or ends to compute changes what they take."""
        if self._profile.cores:
            for node in self._decodes.values():
                self._plan(node, now_s)

    def _stepped(self, node: PrefillNode, now_s: float) -> None:
        done = node.finish()
        for job in done:
            self._prefilled(node, job, now_s)
        self._report(node, now_s)
        for command in node.drain_commands():
            command(now_s)
        self._start(node, now_s)

    def _report(self, node: PrefillNode, now_s: float) -> None:
        node.report(self._index)
        self._fetching.begin(node, now_s)

    def _prefilled(self, node: PrefillNode, job: PrefillJob, now_s: float) -> None:
        if store := self._stores.get(node.worker_id):
            store[0].put(job.request.hashes, self._index)
        self._computed(node.worker_id, job, now_s)
        self._at(
            now_s + self._profile.exposed_transfer_s(job.request.num_prompt_tokens), partial(self._moved, node, job)
        )

    def _computed(self, worker_id: str, job: PrefillJob, now_s: float) -> None:
        """Wherever it was."""
        self._router.release(worker_id, job.number, now_s)
        for share in job.fetches:
            self._ways.learn(worker_id, share, self._block_bytes, now_s)
        record = self._records[job.number]
        record.hit_tokens, record.fetched_tokens = job.hit_tokens, job.fetched_tokens
        record.tier = job.fetch_tier if job.fetched_tokens else ""
        record.prefill_s = now_s - (job.started_s if job.started_s is not None else now_s)
        record.first_token_s = now_s + self._profile.request_overhead_s

    def _moved(self, node: PrefillNode, job: PrefillJob, now_s: float) -> None:
        """The decode worker has all of the prompt's KV."""
        node.give_back(job)
        self._start(node, now_s)
        steps = job.request.num_output_tokens - 1
        record = self._records[job.number]
        if steps < 1:
            record.finished_s = record.first_token_s
            self._keep(job)
        elif job.decode_id in self._decodes:
            self._join(self._decodes[job.decode_id], job, now_s)
        else:
            self._finished(job.number, now_s + self._alone_s(job.request.num_prompt_tokens, steps))

    def _keep(self, job: PrefillJob) -> None:
        """A request that ends with its first token ends the pull of it: what earlier steps computed has come."""
        if (decode := self._decodes.get(job.decode_id)) is not None:
            decode.keep(job.request.hashes[: job.num_pulled_blocks])
            decode.publish(self._index)

    def _alone_s(self, context: int, steps: int) -> float:
        """`steps` decode steps of a batch of one."""
        profile = self._profile
        read = steps * context + steps * (steps - 1) / 2
        return steps * (profile.step_base_s + profile.step_per_row_s) + profile.step_per_token_s * read

    def _join(self, node: DecodeNode, job: PrefillJob, now_s: float) -> None:
        node.accept(self._decode_job(node, job), now_s)
        self._plan(node, now_s)

    def _decode_job(self, node: DecodeNode, job: PrefillJob) -> DecodeJob:
        request, block_tokens = job.request, self._workload.block_tokens
        tokens = request.num_prompt_tokens + request.num_output_tokens
        num_blocks = min(node.pool.num_blocks, -(-tokens // block_tokens))
        hashes = (*request.full_hashes(block_tokens), *request.answer_hashes)[:num_blocks]
        return DecodeJob(
            job.number, request.num_prompt_tokens, max(0, request.num_output_tokens - 1), num_blocks, hashes
        )

    def _finished(self, number: int, now_s: float) -> None:
        """Its last token takes the same way to the client as its first."""
        self._records[number].finished_s = now_s + self._profile.request_overhead_s

    def _plan(self, node: DecodeNode, now_s: float) -> None:
        """The node's next event; one that was planned before is void."""
        if self._profile.cores or self._options.paces:
            node.slow_down(self._pace(now_s).decode * self._slowdown(node, now_s), now_s)
        self._versions[node.worker_id] += 1
        when_s = node.next_event_s(now_s)
        if when_s is not None:
            self._at(when_s, partial(self._step, node, self._versions[node.worker_id]))

    def _step(self, node: DecodeNode, version: int, now_s: float) -> None:
        if version != self._versions[node.worker_id]:
            return
        change = node.advance(now_s)
        for job in change.prefilled:
            self._computed(node.worker_id, job, now_s)
        for left in change.left:
            self._finished(left.number, now_s)
        node.publish(self._index)
        self._fetching.begin(node, now_s)
        self._plan(node, now_s)

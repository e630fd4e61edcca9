"""`tailrace bench router`: what a routing decision takes, and which part of it is what.

In the process's own Router and index: prompts of 12,000 tokens in blocks of 16, an index of a million blocks that 64
prefill workers hold, requests in flight on each. Arms, by turns: prompts of which nothing was seen before, those of
which a worker holds the first 600 blocks, and next turns of conversations, of which it does too and which name their
session. Between two decisions some workers report a new load, as they do all the time.
"""

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from tailrace.checkpoint.cache_dir import default_cache_dir
from tailrace.cli.bench.report import Percentiles, header, print_footer
from tailrace.cli.bench.run import show
from tailrace.errors import UnavailableError
from tailrace.index.compact import CompactIndex, load_functions
from tailrace.kv.chains import NativeChains
from tailrace.kv.events import KVEvents, Tier
from tailrace.kv.hashing import chain_seed, hash_blocks
from tailrace.messages import OwnerRate
from tailrace.policy.fetching import FetchRates
from tailrace.policy.pairs import NO_PAIRS, PairRates
from tailrace.policy.router import Lenders, Router
from tailrace.policy.routing import Route, RouteRequest, WorkerView
from tailrace.policy.sessions import session_key
from tailrace.types import Role

BLOCK_SIZE = 16
PROMPT_TOKENS = 12_000
SHARED_TOKENS = 9_600
"""Of a prompt that a worker holds the beginning of."""
BYTES_PER_TOKEN = 131_072
REPORTS_BETWEEN = 8
"""Workers that tell of a new load between two decisions."""
IN_FLIGHT = 2
"""Requests on each prefill worker that it has not computed yet."""
_LAYOUT = b"a layout of the benchmark"
_SEED = chain_seed(_LAYOUT)
_EPOCH = 1
ARMS = ("new prompt", "shared prefix", "next turn")
PARTS = ("hashing", "views", "lookup", "pricing and choosing", "all")


@dataclass(frozen=True, slots=True)
class RouterBenchOptions:
    prefill: int = 64
    decode: int = 64
    stores: int = 0
    blocks: int = 1_000_000
    """Of the index."""
    decisions: int = 600
    """Counted, of each arm."""
    mixed_links: bool = False
    """Each pair of a prefill and a decode worker has a rate of its own; else they all have their decode worker's."""


@dataclass(slots=True)
class _Timed:
    """Microseconds by arm and part."""

    times: dict[str, dict[str, list[float]]] = field(
        default_factory=lambda: {arm: {part: [] for part in PARTS} for arm in ARMS}
    )


class _TimedIndex:
    """Says how long the last decision's lookups took."""

    def __init__(self, index: CompactIndex) -> None:
        self._index = index
        self.seconds = 0.0

    def longest_prefix(self, hashes: Sequence[bytes]) -> dict[str, int]:
        began = time.perf_counter()
        found = self._index.longest_prefix(hashes)
        self.seconds += time.perf_counter() - began
        return found

    def longest_prefix_by_tier(self, hashes: Sequence[bytes]) -> Any:
        began = time.perf_counter()
        found = self._index.longest_prefix_by_tier(hashes)
        self.seconds += time.perf_counter() - began
        return found

    def deepest_runs(self, hashes: Sequence[bytes], span: int) -> Any:
        return self._index.deepest_runs(hashes, span)


class Cluster:
    """Workers with loads of their own, and the state that a gateway keeps of them."""

    def __init__(self, options: RouterBenchOptions) -> None:
        self._random = random.Random(0)  # noqa: S311 - loads, not secrets
        self._mixed_links = options.mixed_links
        self.index = CompactIndex(load_functions(default_cache_dir()))
        self.timed = _TimedIndex(self.index)
        self.router = Router(self.timed)
        self.chains = NativeChains(default_cache_dir())
        self.rates = FetchRates()
        self.store_ids = [f"store-{n}" for n in range(options.stores)]
        self.prefills = [self._view(f"prefill-{n:02}", Role.PREFILL) for n in range(options.prefill)]
        self.decodes = [self._view(f"decode-{n:02}", Role.DECODE) for n in range(options.decode)]
        self._loads = {view.worker_id: view for view in (*self.prefills, *self.decodes)}
        self.now_s = 0.0
        self._measure_pairs()
        self.conversations = self._fill(options.blocks)
        self._load()

    def _view(self, worker_id: str, role: Role) -> WorkerView:
        rand = self._random
        pairs = self._pairs() if role is Role.DECODE and self._mixed_links else NO_PAIRS
        return WorkerView(
            worker_id,
            role,
            _LAYOUT,
            num_waiting=rand.randrange(3),
            num_running=rand.randrange(1, 48),
            waiting_tokens=rand.randrange(30_000) if role is Role.PREFILL else 0,
            free_blocks=rand.randrange(5_000, 20_000),
            cached_blocks=10_000,
            total_blocks=30_000,
            prefill_tokens_per_s=rand.uniform(25_000, 30_000),
            prefill_curve_s=rand.uniform(1e-10, 2e-10),
            decode_step_s=rand.uniform(0.01, 0.02),
            decode_base_s=0.008,
            decode_row_s=rand.uniform(1e-4, 2e-4),
            transfer_bytes_per_s=pairs.usual or (rand.uniform(3e10, 5e10) if role is Role.DECODE else 0.0),
            pairs=pairs,
            max_num_seqs=256,
        )

    def _pairs(self) -> PairRates:
        """All are measured: half of them near, a few slow, and told in the steps that workers tell them in."""
        rates = (5e10, 5e10 / 2**0.25, 2.5e10, 2.5e10 * 2**0.25, 6e9)
        owners = [view.worker_id for view in self.prefills]
        drawn = self._random.choices(rates, weights=(25, 25, 23, 23, 4), k=len(owners))
        return PairRates.of(OwnerRate(owner, rate) for owner, rate in zip(owners, drawn, strict=True))

    def _measure_pairs(self) -> None:
        """A third of all pairs have been fetched over."""
        holders = [view.worker_id for view in self.prefills]
        for needer in holders:
            for holder in self._random.sample(holders, len(holders) // 3):
                for num_bytes in (10**7, 10**9):
                    seconds = 0.002 + num_bytes / self._random.uniform(2e10, 5e10)
                    self.rates.succeeded(holder, needer, Tier.WORKER, num_bytes, seconds)

    def _fill(self, num_blocks: int) -> list[list[int]]:
        """Prompts, each held by one worker and every fourth by another too; a store holds all, half of it on its disk.

        Beside those that will be asked for there are random names, which cost less to make.
        """
        rand = self._random
        sequences: dict[str, int] = {}

        def publish(holder: str, hashes: Sequence[bytes], tier: Tier = Tier.WORKER) -> None:
            first = sequences.get(holder, 0)
            if not self.index.apply(holder, _EPOCH, first, KVEvents.published(list(hashes), tier)):
                raise UnavailableError(f"the index has missed events of {holder}")
            sequences[holder] = first + len(hashes)

        names = [view.worker_id for view in self.prefills]
        conversations = []
        for number in range(200):
            tokens = [rand.randrange(128_000) for _ in range(SHARED_TOKENS)]
            hashes = hash_blocks(tokens, BLOCK_SIZE, _SEED)
            conversations.append(tokens)
            publish(names[number % len(names)], hashes)
            if number % 4 == 0:
                publish(names[(number + 1) % len(names)], hashes)
            if self.store_ids:
                store = self.store_ids[number % len(self.store_ids)]
                publish(store, hashes[: len(hashes) // 2], Tier.CPU)
                publish(store, hashes[len(hashes) // 2 :], Tier.NVME)
        while sum(sequences.values()) < num_blocks:
            publish(names[rand.randrange(len(names))], [rand.randbytes(16) for _ in range(750)])
        return conversations

    def _load(self) -> None:
        """What each prefill worker was sent and has not computed."""
        for handle in range(IN_FLIGHT * len(self.prefills)):
            route = self.decide([self._random.randrange(128_000) for _ in range(3_000)])[1]
            self.hold(route, handle)

    def hold(self, route: Route, handle: int) -> None:
        self.router.hold(route, handle, self.now_s, len(self.prefills))

    def report(self) -> Callable[[], None]:
        """Some workers have told their load: their views are made anew, by whoever looks at them first."""
        changed = [
            (views, self._random.randrange(len(views)), self._random.randrange(48))
            for views in (self.prefills, self.decodes)
            for _ in range(REPORTS_BETWEEN // 2)
        ]

        def look() -> None:
            for views, place, running in changed:
                view = views[place] = replace(views[place], num_running=running)
                self._loads[view.worker_id] = view

        return look

    def _can_lend(self, worker_id: str) -> bool:
        """As a gateway's Sourcing says it, of workers that are all there."""
        return not self._loads[worker_id].draining

    def decide(
        self, tokens: list[int], session: str = "", look: Callable[[], None] = lambda: None
    ) -> tuple[dict[str, float], Route]:
        """Seconds of each part. As `PairDispatcher._route` does it. Raises UnavailableError where nobody is found."""
        self.timed.seconds = 0.0
        began = time.perf_counter()
        hashes = self.chains.hash_blocks(tokens, BLOCK_SIZE, _SEED)
        hashed = time.perf_counter()
        look()
        store_ids = frozenset(self.store_ids)
        self.rates.advance(self.now_s)
        lenders = Lenders(self.rates, self._can_lend, store_ids)
        seen = time.perf_counter()
        route = self.router.route(
            RouteRequest(len(tokens), BLOCK_SIZE),
            hashes,
            self.prefills,
            self.decodes,
            bytes_per_token=BYTES_PER_TOKEN,
            now_s=self.now_s,
            lenders=lenders,
            session=session_key(session, ""),
        )
        done = time.perf_counter()
        if route is None:
            raise UnavailableError("no pair was found")
        lookup = self.timed.seconds
        parts = (hashed - began, seen - hashed, lookup, done - seen - lookup, done - began)
        return dict(zip(PARTS, parts, strict=True)), route


def run_router(options: RouterBenchOptions, *, as_json: bool) -> None:
    """Prints a table, or one JSON object on stdout. Raises NativeUnavailableError without a C compiler."""
    head = header("router", packages=("tailrace",))
    timed = measure(options)
    result = {
        **head,
        "options": asdict(options),
        "prompt_tokens": PROMPT_TOKENS,
        "decision_us": {
            arm: {part: asdict(Percentiles.of([s * 1e6 for s in times], digits=0)) for part, times in parts.items()}
            for arm, parts in timed.items()
        },
    }
    show(result, _print, as_json=as_json)


def measure(options: RouterBenchOptions) -> dict[str, dict[str, list[float]]]:
    """Seconds by arm and part. Raises UnavailableError where a decision does not find what the index holds."""
    cluster = Cluster(options)
    rand = random.Random(1)  # noqa: S311
    timed = _Timed().times
    # What was made so far stays: a collection that looks at all of it is not a decision's.
    gc.collect()
    gc.freeze()
    handle = 1 << 20
    for number in range(len(ARMS) * (options.decisions + 10)):
        arm = ARMS[number % len(ARMS)]
        tokens, known_blocks = _prompt(cluster, rand, arm, number // len(ARMS))
        look = cluster.report()
        parts, route = cluster.decide(tokens, f"session {number % 500}" if arm == "next turn" else "", look)
        if route.known_blocks < known_blocks:
            raise UnavailableError(f"{arm}: {route.known_blocks} blocks found, where {known_blocks} are held")
        if number >= 10 * len(ARMS):
            for part, seconds in parts.items():
                timed[arm][part].append(seconds)
        cluster.now_s += 0.005
        cluster.hold(route, handle)
        cluster.router.release(route.prefill_id or route.decode_id, handle, cluster.now_s)
        handle += 1
    gc.unfreeze()
    return timed


def _prompt(cluster: Cluster, rand: random.Random, arm: str, number: int) -> tuple[list[int], int]:
    """And how many of its blocks somebody holds."""
    if arm == "new prompt":
        return [rand.randrange(128_000) for _ in range(PROMPT_TOKENS)], 0
    beginning = cluster.conversations[number % len(cluster.conversations)]
    rest = [rand.randrange(128_000) for _ in range(PROMPT_TOKENS - len(beginning))]
    return [*beginning, *rest], SHARED_TOKENS // BLOCK_SIZE


def _print(result: dict[str, Any]) -> None:
    console = Console()
    options = result["options"]
    title = f"{options['prefill']} prefill, {options['decode']} decode workers: a decision in us, p50 / p90 / p99"
    table = Table("", *ARMS, title=title)
    for part in PARTS:
        table.add_row(part, *(str(Percentiles(**result["decision_us"][arm][part])) for arm in ARMS))
    console.print(table)
    print_footer(console, result)

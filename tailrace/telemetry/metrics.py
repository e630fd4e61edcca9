"""What the gateway says of its workers and its choices, for Prometheus; the HTTP edge counts its requests by itself.

A process makes one registry and passes it on; none is global.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tailrace.index.prefix_index import IndexStats
from tailrace.messages import Load
from tailrace.types import Role

_NO_STATS = IndexStats(0, 0, 0, 0, 0, 0)
_BLOCK_STATES = ("free", "active", "cached", "lent", "landing", "quarantined")
_GAUGES: dict[str, tuple[str, Callable[[Load], float]]] = {
    "tailrace_worker_waiting": ("Requests accepted and not started.", lambda load: load.num_waiting),
    "tailrace_worker_running": ("Sequences being computed.", lambda load: load.num_running),
    "tailrace_worker_prefill_tokens_per_s": (
        "Prompt tokens computed a second, weighted; 0: not measured.",
        lambda load: load.prefill_tokens_per_s,
    ),
    "tailrace_worker_decode_step_seconds": (
        "Duration of a decode step, weighted; 0: not measured.",
        lambda load: load.decode_step_s,
    ),
    "tailrace_worker_transfer_bytes_per_s": (
        "KV bytes pulled a second of reading, weighted; 0: not measured.",
        lambda load: load.transfer_bytes_per_s,
    ),
}


@dataclass(frozen=True, slots=True)
class WorkerSample:
    """An attached worker and its last load report."""

    worker_id: str
    role: Role
    load: Load
    uses_line: bool = False
    """Its steps come over a connection of their own, not over gRPC."""
    indexed_blocks: int = 0
    """That the gateway's prefix index thinks it holds."""


@dataclass(frozen=True, slots=True)
class RedisSample:
    is_up: bool
    """Its registry and streams are followed."""
    num_workers: int
    num_troubles: int
    """Times that it was lost, for whatever reason."""
    num_gateways: int = 0
    """Others that have something in flight."""


@dataclass(frozen=True, slots=True)
class IndexSample:
    """The prefix index of this gateway, and what feeds it."""

    num_snapshots: int = 0
    redis: RedisSample | None = None
    num_replays: int = 0
    stats: IndexStats = _NO_STATS


class GatewayMetrics:
    """`workers` and `index` are asked at each scrape: a worker that has left is in no gauge any more."""

    def __init__(
        self,
        registry: CollectorRegistry,
        workers: Callable[[], Iterable[WorkerSample]],
        index: Callable[[], IndexSample] = IndexSample,
    ) -> None:
        self._lost = Counter("tailrace_workers_lost", "Workers that went away.", ["role"], registry=registry)
        self._replays = Counter(
            "tailrace_replays", "Attempts started again, by why the one before ended.", ["cause"], registry=registry
        )
        self._cached = Counter(
            "tailrace_prefix_hit_tokens", "Prompt tokens not computed, by where found.", ["tier"], registry=registry
        )
        registry.register(_WorkerGauges(workers))
        registry.register(_IndexGauges(index))

    def worker_lost(self, role: Role) -> None:
        self._lost.labels(role).inc()

    def replayed(self, cause: str) -> None:
        self._replays.labels(cause).inc()

    def cached(self, tokens: int, *, tier: str) -> None:
        self._cached.labels(tier).inc(tokens)


class _WorkerGauges(Collector):
    def __init__(self, workers: Callable[[], Iterable[WorkerSample]]) -> None:
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        samples = list(self._workers())
        yield _by_role(samples)
        yield _by_carrier(samples)
        yield _blocks(samples)
        yield _indexed(samples)
        yield _links(samples)
        for name, (text, value) in _GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=["worker", "role"])
            for sample in samples:
                gauge.add_metric([sample.worker_id, sample.role], value(sample.load))
            yield gauge


class _IndexGauges(Collector):
    def __init__(self, index: Callable[[], IndexSample]) -> None:
        self._index = index

    def collect(self) -> Iterator[Metric]:
        """Without Redis nothing is said of it."""
        index = self._index()
        stats = index.stats
        yield GaugeMetricFamily("tailrace_index_bytes", "Bytes that the prefix index takes.", value=stats.num_bytes)
        for name, text, value in (
            ("lookups", "Prompts looked up.", stats.num_lookups),
            ("refused_blocks", "Blocks not taken up for a limit.", stats.num_refused),
            ("snapshots", "Snapshots asked of workers: one for each found, one for each gap.", index.num_snapshots),
            ("replays", "Gaps closed with events that Redis still had.", index.num_replays),
        ):
            yield CounterMetricFamily(f"tailrace_index_{name}", text, value=value)
        if (redis := index.redis) is not None:
            yield GaugeMetricFamily("tailrace_redis_up", "Redis is followed.", value=float(redis.is_up))
            yield GaugeMetricFamily("tailrace_redis_workers", "Workers registered in Redis.", value=redis.num_workers)
            yield GaugeMetricFamily(
                "tailrace_redis_gateways", "Other gateways with something in flight.", value=redis.num_gateways
            )
            yield CounterMetricFamily("tailrace_redis_troubles", "Times Redis was lost.", value=redis.num_troubles)


def _by_role(samples: list[WorkerSample]) -> Metric:
    gauge = GaugeMetricFamily("tailrace_workers", "Attached workers.", labels=["role"])
    for role in Role:
        gauge.add_metric([role], sum(sample.role is role for sample in samples))
    return gauge


def _by_carrier(samples: list[WorkerSample]) -> Metric:
    gauge = GaugeMetricFamily("tailrace_attached_workers", "By what carries their steps.", labels=["steps"])
    for steps, uses_line in (("line", True), ("grpc", False)):
        gauge.add_metric([steps], sum(sample.uses_line is uses_line for sample in samples))
    return gauge


def _blocks(samples: list[WorkerSample]) -> Metric:
    """The states add up to all blocks of the worker."""
    gauge = GaugeMetricFamily("tailrace_kv_blocks", "KV blocks by state.", labels=["worker", "role", "state"])
    for sample in samples:
        for state in _BLOCK_STATES:
            gauge.add_metric([sample.worker_id, sample.role, state], getattr(sample.load, f"{state}_blocks"))
    return gauge


def _indexed(samples: list[WorkerSample]) -> Metric:
    text = "Blocks that the prefix index thinks the worker holds."
    gauge = GaugeMetricFamily("tailrace_index_blocks", text, labels=["worker", "role"])
    for sample in samples:
        gauge.add_metric([sample.worker_id, sample.role], sample.indexed_blocks)
    return gauge


def _links(samples: list[WorkerSample]) -> Metric:
    text = "Owners that the worker reads, by transport and by why that is not nixl."
    gauge = GaugeMetricFamily("tailrace_worker_links", text, labels=["worker", "role", "transport", "why_not_nixl"])
    for sample in samples:
        for link in sample.load.links:
            gauge.add_metric([sample.worker_id, sample.role, link.transport, link.why_not_nixl], link.num)
    return gauge


def render(registry: CollectorRegistry) -> bytes:
    """The text that a scrape gets."""
    return generate_latest(registry)

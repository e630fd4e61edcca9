"""Prometheus metrics of a gateway and of a worker. A process makes one registry and passes it on; none is global."""

from dataclasses import asdict, dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST

_STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """Blocks by state; the fields are the values of the label `state`."""

    free: int
    active: int
    cached: int
    lent: int
    landing: int
    quarantined: int


class WorkerMetrics:
    """What a prefill or decode worker says about itself."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._blocks = Gauge("tailrace_kv_blocks", "KV blocks by state.", ["state"], registry=registry)
        self._steps = Histogram(
            "tailrace_step_seconds", "Duration of an engine step.", buckets=_STEP_SECONDS, registry=registry
        )
        self._tokens = Counter("tailrace_step_tokens", "Tokens computed, by kind of row.", ["kind"], registry=registry)
        self._host = Gauge(
            "tailrace_host_share", "Share of a step that Python outside the engine thread took.", registry=registry
        )
        self._waiting = Gauge("tailrace_requests_waiting", "Requests accepted and not started.", registry=registry)
        self._running = Gauge("tailrace_requests_running", "Requests in the running batch.", registry=registry)
        self._preempted = Counter("tailrace_preemptions", "Sequences preempted for lack of blocks.", registry=registry)
        self._hit_tokens = Counter("tailrace_cached_tokens", "Prompt tokens taken from the cache.", registry=registry)
        self._prompt_tokens = Counter("tailrace_prompt_tokens", "Prompt tokens of started requests.", registry=registry)
        labels = ["transport", "outcome"]
        self._pulled = Counter("tailrace_transfer_bytes", "Bytes pulled from owners.", labels, registry=registry)
        self._pulls = Histogram(
            "tailrace_transfer_seconds", "Duration of a pull.", labels, buckets=_STEP_SECONDS, registry=registry
        )
        self._failures = Counter("tailrace_failures", "Legs that failed, by error code.", ["code"], registry=registry)

    def set_blocks(self, counts: BlockCounts) -> None:
        for state, count in asdict(counts).items():
            self._blocks.labels(state).set(count)

    def set_queue(self, *, waiting: int, running: int) -> None:
        self._waiting.set(waiting)
        self._running.set(running)

    def step(self, elapsed_s: float, *, prefill_tokens: int, decode_tokens: int, host_share: float) -> None:
        self._steps.observe(elapsed_s)
        self._tokens.labels("prefill").inc(prefill_tokens)
        self._tokens.labels("decode").inc(decode_tokens)
        self._host.set(host_share)

    def started(self, *, prompt_tokens: int, cached_tokens: int) -> None:
        self._prompt_tokens.inc(prompt_tokens)
        self._hit_tokens.inc(cached_tokens)

    def preempted(self) -> None:
        self._preempted.inc()

    def pulled(self, num_bytes: int, elapsed_s: float, *, transport: str, outcome: str) -> None:
        self._pulled.labels(transport, outcome).inc(num_bytes)
        self._pulls.labels(transport, outcome).observe(elapsed_s)

    def failed(self, code: str) -> None:
        self._failures.labels(code).inc()


class GatewayMetrics:
    """What the gateway says about its workers and its choices; services.gateway.http_metrics tells of the HTTP edge."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._workers = Gauge("tailrace_workers", "Attached workers by role.", ["role"], registry=registry)
        self._lost = Counter("tailrace_workers_lost", "Workers that went away.", ["role"], registry=registry)
        self._replays = Counter("tailrace_replays", "Requests moved to another pair.", ["cause"], registry=registry)
        self._cached = Counter("tailrace_prefix_hit_tokens", "Prompt tokens not computed.", ["tier"], registry=registry)

    def set_workers(self, role: str, count: int) -> None:
        self._workers.labels(role).set(count)

    def worker_lost(self, role: str) -> None:
        self._lost.labels(role).inc()

    def replayed(self, cause: str) -> None:
        self._replays.labels(cause).inc()

    def cached(self, tokens: int, *, tier: str) -> None:
        self._cached.labels(tier).inc(tokens)


def render(registry: CollectorRegistry) -> bytes:
    """The text that a scrape gets; its type is CONTENT_TYPE."""
    return generate_latest(registry)

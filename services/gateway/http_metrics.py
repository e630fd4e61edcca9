"""What the edge measures, with the standard definitions: TTFT, TPOT and ICL as clients see them."""

import time
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_FINE_SECONDS = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 10, 30)


class TokenHistogram(Collector):
    """A histogram for what is observed once a token. Event loop only: it has no locks, which cost most of it."""

    def __init__(self, name: str, documentation: str, bounds: Sequence[float]) -> None:
        """`bounds`: upper ones, ascending; the last bucket, without a bound, is added."""
        self._name, self._documentation = name, documentation
        self.bounds = array("d", bounds)
        self.counts = array("Q", bytes(8 * (len(bounds) + 1)))
        """One for each bound, of the values up to it, and one for all beyond. Compiled code may count too."""
        self.sum = array("d", (0.0,))

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum[0] += value

    def collect(self) -> Iterator[Metric]:
        names = [*map(str, self.bounds), "+Inf"]
        buckets = [(name, float(count)) for name, count in zip(names, accumulate(self.counts), strict=True)]
        yield HistogramMetricFamily(self._name, self._documentation, buckets=buckets, sum_value=self.sum[0])


class HttpMetrics:
    """A registry of its own, so that several apps can live in one process."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "tailrace_http_requests", "HTTP requests answered.", ["method", "route", "status"], registry=registry
        )
        self.in_flight = Gauge("tailrace_http_requests_in_flight", "HTTP requests being answered.", registry=registry)
        self.disconnects = Counter(
            "tailrace_http_disconnects",
            "Requests whose client left, or was cut for not reading.",
            ["why"],
            registry=registry,
        )
        self.ttft = Histogram(
            "tailrace_http_ttft_seconds", "First content minus arrival.", buckets=_SECONDS, registry=registry
        )
        self.tpot = Histogram(
            "tailrace_http_tpot_seconds",
            "(latency - TTFT) / (tokens - 1), a choice.",
            buckets=_FINE_SECONDS,
            registry=registry,
        )
        self.icl = TokenHistogram("tailrace_http_icl_seconds", "Every gap between contents of a choice.", _FINE_SECONDS)
        registry.register(self.icl)
        self.tokens = Counter(
            "tailrace_http_tokens", "Tokens of finished requests.", ["kind"], registry=registry
        )  # prompt, cached, completion

    def text(self) -> bytes:
        return generate_latest(self._registry)


class ChoiceClock:
    """When contents of one choice came, in monotonic seconds."""

    __slots__ = ("_icl", "first", "last")

    def __init__(self, icl: TokenHistogram) -> None:
        self._icl = icl
        self.first: float | None = None
        self.last = 0.0

    def content(self, now: float) -> None:
        """One more, after the first."""
        self._icl.observe(now - self.last)
        self.last = now


class AnswerTimer:
    """Times one request's choices from its arrival on."""

    def __init__(
        self, metrics: HttpMetrics, num_choices: int, arrived_at: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._metrics = metrics
        self._arrived_at = arrived_at
        self._now = now
        self._clocks = [ChoiceClock(metrics.icl) for _ in range(num_choices)]
        self._has_content = False

    def clock(self, choice: int) -> ChoiceClock:
        return self._clocks[choice]

    def content(self, choice: int) -> None:
        """New text of a choice is ready to be sent."""
        now, clock = self._now(), self._clocks[choice]
        if clock.first is not None:
            clock.content(now)
            return
        clock.first = clock.last = now
        if not self._has_content:
            self._has_content = True
            self._metrics.ttft.observe(now - self._arrived_at)

    def end(self, choice: int, num_tokens: int) -> None:
        clock = self._clocks[choice]
        if clock.first is not None and num_tokens > 1:
            self._metrics.tpot.observe((clock.last - clock.first) / (num_tokens - 1))

    def total(self, *, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> None:
        """Every choice has ended."""
        self._metrics.tokens.labels("prompt").inc(prompt_tokens)
        self._metrics.tokens.labels("cached").inc(cached_tokens)
        self._metrics.tokens.labels("completion").inc(completion_tokens)

"""What a router measures for itself: how long prefills take, and how busy it has kept each worker. No clock in here."""

from collections import defaultdict

FORGET = 0.02
"""Share of what was known that each new measurement replaces."""
MEMORY_REQUESTS = 32
"""Requests a worker over which its busy share is an average."""
MAX_BUSY = 0.9
"""A worker that was given more work than this is priced as if it had been this much: the formula has no bound."""
_RESCALE_ABOVE = 1e200
_FADED = 1e-6


class PrefillFit:
    """Seconds of a prefill = its tokens x (a + b x depth), by least squares with forgetting.

    A prefill of tokens c to n takes a (n - c) + b (n^2 - c^2) seconds: a for the matrices, b for attention. Divided by
    its tokens that is a line over n + c, so that a long prompt does not outweigh all short ones.
    """

    def __init__(self) -> None:
        self._weight = self._depth = self._cost = self._depth_depth = self._depth_cost = 0.0

    def add(self, cached_tokens: int, prompt_tokens: int, seconds: float) -> None:
        """One prefill that took `seconds`; an impossible measurement is ignored."""
        computed = prompt_tokens - cached_tokens
        if computed < 1 or not 0.0 < seconds < float("inf"):
            return
        depth, cost, keep = float(prompt_tokens + cached_tokens), seconds / computed, 1.0 - FORGET
        self._weight = keep * self._weight + 1.0
        self._depth = keep * self._depth + depth
        self._cost = keep * self._cost + cost
        self._depth_depth = keep * self._depth_depth + depth * depth
        self._depth_cost = keep * self._depth_cost + depth * cost

    @property
    def curve_s(self) -> float:
        """b, seconds per square token; 0 while it cannot be told from noise."""
        return self._line()[1]

    @property
    def tokens_per_s(self) -> float:
        """1 / a; 0 before the first measurement."""
        base = self._line()[0]
        return 1.0 / base if base > 0.0 else 0.0

    def _line(self) -> tuple[float, float]:
        if not self._weight:
            return 0.0, 0.0
        depth, cost = self._depth / self._weight, self._cost / self._weight
        variance = self._depth_depth / self._weight - depth * depth
        if variance <= 1e-6 * depth * depth:
            return cost, 0.0
        slope = max(0.0, (self._depth_cost / self._weight - depth * cost) / variance)
        return (cost - slope * depth, slope) if slope * depth < cost else (cost, 0.0)


class Crowding:
    """How many requests are expected to wait at each worker while it is busy: what a second of its time costs others.

    By Pollaczek and Khinchine, with b the share of time for which a worker is given work and S the length of a prefill,
    b / (1 - b) x E[S^2] / (2 E[S]^2) wait on average behind the one that is computed. b is the worker's own; the
    lengths are those of all workers. The memory is counted in requests, so that it means the same at 1 and at 1,000 a
    second.
    """

    def __init__(self) -> None:
        self._gain = 1.0
        self._elapsed = self._weight = self._sum = self._squares = 0.0
        self._given: defaultdict[str, float] = defaultdict(float)
        self._last_s: float | None = None

    def add(self, worker_id: str, seconds: float, now_s: float, num_workers: int) -> None:
        """`worker_id`, one of `num_workers`, was given a prefill of `seconds`. `now_s` never goes back."""
        gain = self._gain
        if self._last_s is not None:
            self._elapsed += max(0.0, now_s - self._last_s) * gain
        self._last_s = now_s
        self._given[worker_id] += seconds * gain
        self._weight += gain
        self._sum += seconds * gain
        self._squares += seconds * seconds * gain
        # Later entries count more, which is the same as that earlier ones fade.
        self._gain *= 1.0 + 1.0 / (MEMORY_REQUESTS * max(1, num_workers))
        if self._gain > _RESCALE_ABOVE:
            self._rescale()
        if len(self._given) > 2 * num_workers:
            self._drop_faded()

    def waiting(self) -> dict[str, float]:
        """By worker id, requests; empty before any time has passed. Workers that were given nothing are not named."""
        if not self._elapsed or not self._sum:
            return {}
        spread = self._squares * self._weight / (2.0 * self._sum * self._sum)
        busy = {worker_id: min(MAX_BUSY, given / self._elapsed) for worker_id, given in self._given.items()}
        return {worker_id: spread * share / (1.0 - share) for worker_id, share in busy.items()}

    def _drop_faded(self) -> None:
        """Workers that have long been given nothing have left: ids are drawn anew, and must not pile up."""
        self._given = defaultdict(float, {k: v for k, v in self._given.items() if v > _FADED * self._sum})

    def _rescale(self) -> None:
        for worker_id in self._given:
            self._given[worker_id] /= self._gain
        self._elapsed /= self._gain
        self._weight /= self._gain
        self._sum /= self._gain
        self._squares /= self._gain
        self._gain = 1.0

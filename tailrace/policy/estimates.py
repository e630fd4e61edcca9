"""What a router measures for itself: how long prefills take, and how busy it has kept each worker. No clock in here."""

from collections import defaultdict
from collections.abc import Iterable

FORGET = 0.02
"""Share of what was known that each new measurement replaces."""
MEMORY_REQUESTS = 32
"""Requests a worker over which its busy share is an average."""
MAX_BUSY = 0.9
"""A worker that was given more work than this is priced as if it had been this much: the formula has no bound."""
MAX_PREFILL_S = 86_400.0
"""No prefill is believed to take longer."""
_RESCALE_ABOVE = 1e200
_FADED = 1e-6


class LineFit:
    """y = a + b x, by weighted least squares with forgetting."""

    def __init__(self, forget: float = FORGET, least_spread: float = 1e-6) -> None:
        """`forget`: the share of what was known that each new measurement replaces.

        `least_spread`: variance of x over its mean squared, below which a slope would be made of noise.
        """
        self._keep = 1.0 - forget
        self._least_spread = least_spread
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, x: float, y: float, weight: float = 1.0) -> None:
        keep = self._keep
        self._weight = keep * self._weight + weight
        self._x = keep * self._x + weight * x
        self._y = keep * self._y + weight * y
        self._xx = keep * self._xx + weight * x * x
        self._xy = keep * self._xy + weight * x * y

    @property
    def means(self) -> tuple[float, float]:
        """Of x and y; zeros before the first measurement."""
        return (self._x / self._weight, self._y / self._weight) if self._weight else (0.0, 0.0)

    @property
    def slope(self) -> float | None:
        """b; None while all x are nearly the same."""
        if not self._weight:
            return None
        x, y = self.means
        variance = self._xx / self._weight - x * x
        return (self._xy / self._weight - x * y) / variance if variance > self._least_spread * x * x else None


class PrefillFit:
    """Seconds of a prefill = its tokens x (a + b x depth), by least squares with forgetting.

    A prefill of tokens c to n takes a (n - c) + b (n^2 - c^2) seconds: a for the matrices, b for attention. Divided by
    its tokens that is a line over n + c, so that a long prompt does not outweigh all short ones.
    """

    def __init__(self, forget: float = FORGET, least_spread: float = 1e-6) -> None:
        """As those of LineFit."""
        self._fit = LineFit(forget, least_spread)

    def add(self, cached_tokens: int, prompt_tokens: int, seconds: float) -> None:
        """One prefill that took `seconds`; an impossible measurement is ignored."""
        computed = prompt_tokens - cached_tokens
        if computed >= 1 and 0.0 < seconds < float("inf"):
            self._fit.add(float(prompt_tokens + cached_tokens), seconds / computed)

    def add_step(self, chunks: Iterable[tuple[int, int]], seconds: float) -> None:
        """One step that computed tokens [start, end) of each of some prompts, and nothing else.

        Steps weigh as many tokens as they computed: what a step takes beside its tokens would make a short one's seem
        dear. An impossible measurement is ignored.
        """
        computed = squares = 0
        for start, end in chunks:
            computed += end - start
            squares += end * end - start * start
        if computed >= 1 and 0.0 < seconds < float("inf"):
            self._fit.add(squares / computed, seconds / computed, float(computed))

    def seconds(self, cached_tokens: int, prompt_tokens: int) -> float:
        """Of the prefill of tokens `cached_tokens` to `prompt_tokens`; 0 before the first measurement."""
        base, slope = self._line()
        return base * (prompt_tokens - cached_tokens) + slope * (prompt_tokens**2 - cached_tokens**2)

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
        depth, cost = self._fit.means
        slope = max(0.0, self._fit.slope or 0.0)
        return (cost - slope * depth, slope) if slope * depth < cost else (cost, 0.0)


class StepFit:
    """Seconds of a decode step = base + rows x what a row adds, by least squares with forgetting."""

    def __init__(self, forget: float = FORGET, least_spread: float = 1e-6) -> None:
        """As those of LineFit."""
        self._fit = LineFit(forget, least_spread)

    def add(self, num_rows: int, seconds: float) -> None:
        """An impossible measurement is ignored."""
        if num_rows >= 1 and 0.0 < seconds < float("inf"):
            self._fit.add(float(num_rows), seconds)

    @property
    def base_s(self) -> float:
        """0 before the first measurement; all of the step while every batch was of one size."""
        return self._line()[0]

    @property
    def row_s(self) -> float:
        return self._line()[1]

    def _line(self) -> tuple[float, float]:
        rows, seconds = self._fit.means
        slope = max(0.0, self._fit.slope or 0.0)
        base = seconds - slope * rows
        return (base, slope) if base >= 0.0 else (0.0, seconds / rows)


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
        """`worker_id`, one of `num_workers`, was given a prefill of `seconds`. `now_s` never goes back.

        An impossible time is ignored: it would stay in the sums.
        """
        if not 0.0 <= seconds <= MAX_PREFILL_S:
            return
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
        spread, elapsed = self._squares * self._weight / (2.0 * self._sum * self._sum), self._elapsed
        most = spread * MAX_BUSY / (1.0 - MAX_BUSY)
        return {
            worker_id: spread * share / (1.0 - share) if (share := given / elapsed) < MAX_BUSY else most
            for worker_id, given in self._given.items()
        }

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

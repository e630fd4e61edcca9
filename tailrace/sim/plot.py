"""A simulation as a picture. The only module that knows matplotlib, which is an optional extra."""

from pathlib import Path

from matplotlib.figure import Figure

from tailrace.sim.simulator import Outcome
from tailrace.sim.workload import Workload

_WINDOWS = 60
_DPI = 120


def draw(path: Path, workload: Workload, outcome: Outcome, title: str) -> None:
    """Writes a PNG of four panels: TTFT's distribution, TTFT over time, hits over time, busy time of each worker."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(title)
    (spread, times), (hits, busy) = figure.subplots(2, 2)
    served = [record for record in outcome.records if record.worker_id]
    ttfts = sorted(record.ttft_s for record in served)
    spread.plot(ttfts, [(rank + 1) / len(ttfts) for rank in range(len(ttfts))])
    spread.set(xscale="log", xlabel="TTFT, s", ylabel="share of requests")
    times.plot([r.request.arrival_s for r in served], [r.ttft_s for r in served], ".", markersize=2)
    times.set(yscale="log", xlabel="arrival, s", ylabel="TTFT, s")
    begin_s, width_s = workload.requests[0].arrival_s, max(workload.duration_s, 1e-9) / _WINDOWS
    prompt, own, fetched = [0] * (_WINDOWS + 1), [0] * (_WINDOWS + 1), [0] * (_WINDOWS + 1)
    for record in served:
        window = int((record.request.arrival_s - begin_s) / width_s)
        prompt[window] += record.request.num_prompt_tokens
        own[window] += record.hit_tokens
        fetched[window] += record.fetched_tokens
    used = [window for window, tokens in enumerate(prompt) if tokens]
    starts = [begin_s + window * width_s for window in used]
    hits.stackplot(
        starts,
        [own[window] / prompt[window] for window in used],
        [fetched[window] / prompt[window] for window in used],
        labels=["own", "fetched"],
    )
    hits.set(xlabel="arrival, s", ylabel="share of prompt tokens", ylim=(0, 1))
    hits.legend()
    busy.bar(range(len(outcome.busy_s)), outcome.busy_s)
    busy.set(xlabel="prefill worker", ylabel="busy, s")
    figure.savefig(path, format="png", dpi=_DPI, metadata={"Software": None})

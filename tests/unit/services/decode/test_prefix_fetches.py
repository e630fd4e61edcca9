"""A decode worker that computes a prompt itself and fetches its prefix: its answers, its reports, its ledger.

Every prompt has 30 tokens in blocks of 4; the fake runner fails at the step that reads a block which is not right.
"""

from dataclasses import replace

import pytest

from tailrace.errors import WorkerLostError
from tailrace.kv.events import Tier
from tailrace.messages import HoldingState, LegReport, PrefixSource, Submission
from tailrace.transfer import ReadOutcome
from tailrace.types import SamplingParams
from tailrace.worker import prefix_fetch, reading
from tests.helpers import worker_rigs
from tests.helpers.fake_runner import generate
from tests.helpers.values import make_submission
from tests.helpers.waiting import until
from tests.helpers.worker_rigs import DecodeRig, decode_rig

PROMPT = list(range(100, 130))
ALL = range(7)
FOUR = SamplingParams(max_tokens=4, ignore_eos=True, seed=3)


@pytest.fixture(autouse=True, params=[False, True], ids=["plain", "overlapped"])
def _both_loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_rigs, "OVERLAP", request.param)


def patience(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(prefix_fetch, "patience_s", lambda compute_s: seconds)
    monkeypatch.setattr(reading, "MIN_STALL_S", seconds)


def asking(handle: int, *sources: PrefixSource, **fields: object) -> Submission:
    options = {"tokens": PROMPT, "num_prompt_tokens": 30, "sampling": FOUR, **fields}
    return make_submission(handle, prefix_sources=sources, **options)


async def answer(rig: DecodeRig, submission: Submission) -> LegReport:
    """Checks every token; the report."""
    handle = submission.handle
    await until(lambda: [report for report in rig.gateway.reports if report.handle == handle])
    for choice in submission.choices:
        truth = generate(submission.tokens, submission.sampling, choice, submission.sampling.max_tokens)
        assert rig.gateway.tokens[handle, choice] == truth
    return next(report for report in rig.gateway.reports if report.handle == handle)


async def test_a_prefix_comes_from_several_holders_and_is_told_by_tier() -> None:
    async with decode_rig() as rig:
        first = make_submission(1, tokens=PROMPT[:5], num_prompt_tokens=5, sampling=replace(FOUR, max_tokens=1))
        rig.submit(first)
        await answer(rig, first)
        peer = rig.add_holder("p", PROMPT, range(2))
        store = rig.add_holder("s", PROMPT, range(2, 5), tier=Tier.CPU)
        disk = rig.add_holder("t", PROMPT, range(5, 7), tier=Tier.NVME)
        submission = asking(2, peer.source(), store.source(), disk.source())
        rig.submit(submission)
        report = await answer(rig, submission)
        assert report.cached_tokens == 28
        assert report.cached_by_tier == {"worker": 4, "peer": 4, "cpu": 12, "nvme": 8}
        assert [(f.holder_id, f.num_asked, f.num_blocks, f.num_bytes) for f in report.fetches] == [
            ("p", 1, 1, 256),
            ("s", 3, 3, 768),
            ("t", 2, 2, 512),
        ]
        assert (report.transfer_bytes, report.transport) == (6 * 256, "stream")
        assert min(report.queue_s, report.prefill_s, report.transfer_s, report.decode_s) >= 0
        await rig.until_idle()


@pytest.mark.parametrize(
    ("options", "cached"),
    [
        ({"unreachable": WorkerLostError("gone")}, 0),
        ({"refusal": WorkerLostError("no")}, 0),
        ({"outcome": ReadOutcome.STALE}, 0),
        ({"outcome": ReadOutcome.FAILED}, 0),
        ({"told": []}, 0),
        ({"held": range(3)}, 12),
        ({"held": range(1, 7)}, 0),
        ({"is_silent": True}, 0),
        ({"most": 2}, 28),
    ],
    ids=["dead", "refused", "stale", "failed", "hangs-up", "short", "lying", "silent", "little"],
)
async def test_whatever_becomes_of_a_fetch_the_answer_is_right(
    options: dict[str, object], cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience(monkeypatch, 0.2)
    async with decode_rig() as rig:
        holder = rig.add_holder("p", PROMPT, **{"held": ALL, **options})  # type: ignore[arg-type]
        submission = asking(1, holder.source(0, 7), choices=(0, 1))
        rig.submit(submission)
        report = await answer(rig, submission)
        assert report.cached_tokens == cached
        assert report.cached_by_tier == ({"peer": cached} if cached else {})
        [fetch] = report.fetches
        assert (fetch.holder_id, fetch.num_asked, fetch.num_blocks) == ("p", 7, cached // 4)
        await rig.until_idle()


async def test_others_decode_while_a_prefix_is_on_its_way() -> None:
    async with decode_rig(num_blocks=32) as rig:
        holder = rig.add_holder("p", PROMPT, ALL, outcome=None)
        submission, other = asking(1, holder.source()), asking(2, tokens=list(range(40, 70)))
        rig.submit(submission)
        await until(lambda: holder.pending)
        holdings = await rig.engine.call(rig.worker.holdings)
        assert [(h.state, len(h.blocks)) for h in holdings] == [(HoldingState.ACTIVE, 1), (HoldingState.LANDING, 7)]
        rig.submit(other)
        await answer(rig, other)
        assert (1, 0) not in rig.gateway.tokens
        holder.finish(ReadOutcome.GOOD)
        assert (await answer(rig, submission)).cached_by_tier == {"peer": 28}
        await rig.until_idle()


async def test_a_late_read_costs_no_more_than_its_patience_and_never_a_wrong_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patience(monkeypatch, 0.1)
    async with decode_rig(num_blocks=24) as rig:
        slow = rig.add_holder("slow", PROMPT, range(2, 7), outcome=None)
        good = rig.add_holder("p", PROMPT, range(2), tier=Tier.CPU)
        submission = asking(1, good.source(), slow.source())
        rig.submit(submission)
        report = await answer(rig, submission)
        assert report.cached_by_tier == {"cpu": 8}, "found here when it was admitted again, and fetched all the same"
        assert [(f.num_asked, f.num_blocks) for f in report.fetches] == [(2, 2), (5, 0)]
        await rig.until_ledger("free", "cached", "quarantined")
        slow.finish(ReadOutcome.GOOD)
        await rig.until_idle()


@pytest.mark.parametrize("moment", ["at once", "asking", "reading", "choice by choice"])
async def test_a_cancel_ends_its_fetch_and_leaves_nothing_behind(moment: str) -> None:
    async with decode_rig() as rig:
        holder = rig.add_holder("p", PROMPT, ALL, outcome=None, is_silent=moment == "asking")
        rig.submit(asking(1, holder.source(), choices=(0, 1)))
        if moment != "at once":
            await until(lambda: holder.num_open if moment == "asking" else holder.pending)
        for choices in ((0,), (1,)) if moment == "choice by choice" else ((),):
            rig.cancel(1, choices)
        await until(lambda: not holder.num_open)
        if holder.pending:
            await rig.until_ledger("free", "cached", "landing", "quarantined")
            holder.finish(ReadOutcome.GOOD)
        await rig.until_idle()
        assert (1, 0) not in rig.gateway.tokens


async def test_a_worker_asks_itself_for_nothing_and_a_refused_prompt_names_nobody_later() -> None:
    async with decode_rig(num_blocks=8) as rig:
        own = rig.add_holder("d", PROMPT, ALL)
        short = asking(1, own.source(), tokens=PROMPT[:20], num_prompt_tokens=20)
        rig.submit(short)
        assert (await answer(rig, short)).fetches == ()
        assert own.loans == []
        rig.submit(asking(2, own.source(), tokens=PROMPT * 2, num_prompt_tokens=60))
        await until(lambda: rig.gateway.failed)
        await rig.until_idle()

"""A decode worker that computes a prompt itself and fetches its prefix: its answers, its reports, its ledger.

Every prompt has 30 tokens in blocks of 4; the fake runner fails at the step that reads a block which is not right.
"""

from dataclasses import replace
from functools import partial

import pytest

from tailrace.messages import HoldingState, LegReport, PrefixSource, Submission
from tailrace.transfer import ReadOutcome
from tailrace.types import SamplingParams
from tests.helpers import worker_rigs
from tests.helpers.fake_runner import generate
from tests.helpers.prefix_holders import (
    ALL,
    PROMPT,
    each_fault,
    fetch_from_a_faulty_one,
    fetch_from_a_slow_one,
    fetch_from_three,
    patience,
)
from tests.helpers.values import make_submission
from tests.helpers.waiting import until
from tests.helpers.worker_rigs import DecodeRig, decode_rig

FOUR = SamplingParams(max_tokens=4, ignore_eos=True, seed=3)


@pytest.fixture(autouse=True, params=[False, True], ids=["plain", "overlapped"])
def _both_loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_rigs, "OVERLAP", request.param)


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
        report = await fetch_from_three(rig, answer, first, asking)
        assert report.decode_s >= 0


@each_fault
async def test_whatever_becomes_of_a_fetch_the_answer_is_right(
    options: dict[str, object], cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience(monkeypatch, 0.2)
    async with decode_rig() as rig:
        await fetch_from_a_faulty_one(rig, answer, partial(asking, choices=(0, 1)), (options, cached))


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
        slow = await fetch_from_a_slow_one(rig, answer, asking)
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

"""A prefill worker without model and network that fetches prefixes: its answers, its reports, its ledger.

Every prompt has 30 tokens in blocks of 4; the fake runner fails at the step that reads a block which is not right.
"""

import asyncio
from collections.abc import Callable

import pytest

from tailrace.errors import ErrorCode
from tailrace.messages import HoldingState, LegReport, PrefixSource, Submission
from tailrace.transfer import ReadOutcome
from tests.helpers import worker_rigs
from tests.helpers.fake_runner import generate
from tests.helpers.prefix_holders import (
    ALL,
    PROMPT,
    FakeHolder,
    each_fault,
    fetch_from_a_faulty_one,
    fetch_from_a_slow_one,
    fetch_from_three,
    patience,
)
from tests.helpers.values import make_submission
from tests.helpers.waiting import until
from tests.helpers.worker_rigs import PrefillRig, prefill_rig


@pytest.fixture(autouse=True, params=[False, True], ids=["plain", "overlapped"])
def _both_loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_rigs, "OVERLAP", request.param)


def asking(handle: int, *sources: PrefixSource, **fields: object) -> Submission:
    return make_submission(handle, tokens=PROMPT, num_prompt_tokens=30, prefix_sources=sources, **fields)


async def answer(rig: PrefillRig, submission: Submission) -> LegReport:
    """Checks the first token; the report."""
    handle = submission.handle
    await until(lambda: [report for report in rig.gateway.reports if report.handle == handle])
    assert rig.gateway.tokens[handle, 0] == generate(submission.tokens, submission.sampling, 0, 1)
    rig.cancel(handle)
    return next(report for report in rig.gateway.reports if report.handle == handle)


async def test_a_prefix_comes_from_several_holders_and_is_told_by_tier() -> None:
    async with prefill_rig() as rig:
        await fetch_from_three(rig, answer, make_submission(1, tokens=PROMPT[:5], num_prompt_tokens=5), asking)
        assert str(rig.pool.ledger()) == "free=9 cached=7", "what was fetched can be lent on"


@each_fault
async def test_whatever_becomes_of_a_fetch_the_answer_is_right(
    options: dict[str, object], cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience(monkeypatch, 0.2)
    async with prefill_rig() as rig:
        await fetch_from_a_faulty_one(rig, answer, asking, (options, cached))


async def test_a_late_read_costs_no_more_than_its_patience_and_never_a_wrong_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patience(monkeypatch, 0.3)
    async with prefill_rig(num_blocks=24) as rig:
        slow = await fetch_from_a_slow_one(rig, answer, asking)
        holdings = await rig.engine.call(rig.worker.holdings)
        assert [(h.holder, h.state, len(h.blocks)) for h in holdings] == [
            ("a pending read", HoldingState.QUARANTINED, 5)
        ]
        slow.finish(ReadOutcome.GOOD)
        await rig.until_idle()
        await rig.engine.call(rig.pool.check_integrity)


async def test_the_ledger_names_who_waits_for_its_prefix() -> None:
    async with prefill_rig() as rig:
        slow = rig.add_holder("slow", PROMPT, range(5), outcome=None)
        rig.submit(asking(1, slow.source()))
        await until(lambda: slow.pending)
        holdings = await rig.engine.call(rig.worker.holdings)
        assert [(h.holder, h.state, h.blocks) for h in holdings] == [
            ("r1/0", HoldingState.LANDING, (0, 1, 2, 3, 4)),
            ("r1/0", HoldingState.ACTIVE, (5, 6, 7)),
        ]
        assert (await rig.engine.call(rig.worker.load)).num_waiting == 1
        slow.finish(ReadOutcome.GOOD)
        await until(lambda: rig.gateway.reports)
        rig.cancel(1)
        await rig.until_idle()


async def test_another_prompt_is_computed_while_one_fetches() -> None:
    async with prefill_rig() as rig:
        slow = rig.add_holder("slow", PROMPT, ALL, outcome=None)
        rig.submit(asking(1, slow.source()))
        await until(lambda: slow.pending)
        other = make_submission(2, tokens=list(range(200, 210)))
        rig.submit(other)
        await answer(rig, other)
        assert not [report for report in rig.gateway.reports if report.handle == 1]
        slow.finish(ReadOutcome.GOOD)
        assert (await answer(rig, asking(1))).cached_tokens == 28
        await rig.until_idle()


def _never(holder: FakeHolder) -> None: ...


def _settles_well(holder: FakeHolder) -> None:
    holder.finish(ReadOutcome.GOOD)


@pytest.mark.parametrize("how", ["leg", "gateway", "deadline"])
@pytest.mark.parametrize("moment", ["at once", "granted", "reading", "read"])
@pytest.mark.parametrize("after", [_never, _settles_well], ids=["", "settles"])
async def test_cancelled_at_any_moment_the_ledger_is_whole(
    moment: str, how: str, after: Callable[[FakeHolder], None]
) -> None:
    async with prefill_rig() as rig:
        slow = rig.add_holder("slow", PROMPT, range(5), outcome=None)
        rig.submit(asking(1, slow.source(), deadline_s=0.03 if how == "deadline" else 30.0))
        if moment == "granted":
            await until(lambda: rig.service._fetches)
        elif moment != "at once":
            await until(lambda: slow.pending)
        if moment == "read":
            slow.finish(ReadOutcome.GOOD)
            await asyncio.sleep(0)
        if how == "leg":
            rig.cancel(1)
        elif how == "gateway":
            rig.attachments.close(rig.gateway.session)
        else:
            await until(lambda: rig.gateway.failed or rig.gateway.reports)
        await until(lambda: not rig.service._fetches)
        if slow.pending:
            await rig.until_ledger("free", "quarantined")
            assert (await rig.engine.call(rig.pool.ledger)).quarantined == 5
            after(slow)
            while slow.pending:
                slow.finish(ReadOutcome.FAILED)
        await rig.engine.call(rig.pool.check_integrity)
        rig.cancel(1)
        await rig.until_idle()
        assert slow.num_open == 0
        if how == "deadline" and rig.gateway.failed:
            assert rig.gateway.failed[0].error.code is ErrorCode.DEADLINE_EXCEEDED


async def test_this_worker_itself_is_no_source() -> None:
    async with prefill_rig() as rig:
        own = rig.add_holder("needer", PROMPT, ALL)
        submission = asking(1, own.source())
        rig.submit(submission)
        report = await answer(rig, submission)
        assert (report.cached_tokens, report.fetches, own.loans) == (0, (), [])
        await rig.until_idle()


async def test_prompts_that_come_together_fetch_their_prefix_once() -> None:
    async with prefill_rig(num_blocks=40) as rig:
        holder = rig.add_holder("p", PROMPT, ALL)
        submissions = [asking(handle, holder.source()) for handle in (1, 2, 3)]
        for submission in submissions:
            rig.submit(submission)
        reports = [await answer(rig, submission) for submission in submissions]
        assert len(holder.loans) == 1
        assert [report.cached_by_tier for report in reports] == [{"peer": 28}, {"worker": 28}, {"worker": 28}]
        await rig.until_idle()

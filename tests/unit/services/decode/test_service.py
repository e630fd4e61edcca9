"""A decode worker without model and network.

Pulls that go well, stall, fail or are cancelled, what the gateway sees of them, and what stays on the ledger.
"""

import asyncio
from dataclasses import replace

import pytest

from services.decode import pull as pull_module
from tailrace.errors import ErrorCode, LayoutMismatchError, NotFoundError, WorkerLostError
from tailrace.messages import HoldingState, Submission
from tailrace.transfer import ReadOutcome
from tailrace.types import FinishReason, SamplingParams
from tailrace.worker import reading
from tests.helpers import worker_rigs
from tests.helpers.fake_runner import generate
from tests.helpers.values import make_source, make_submission
from tests.helpers.waiting import until
from tests.helpers.worker_rigs import DecodeRig, FakeOwner, decode_rig

FOUR = SamplingParams(max_tokens=4, ignore_eos=True, seed=3)


def pulled(handle: int = 1, **fields: object) -> Submission:
    return make_submission(handle, **{"source": make_source(), "sampling": FOUR, **fields})


def start(rig: DecodeRig, submission: Submission) -> FakeOwner:
    owner = rig.start_owner(submission)
    rig.submit(submission)
    return owner


async def check_answer(rig: DecodeRig, submission: Submission) -> None:
    handle = submission.handle
    await until(lambda: all((handle, choice) in rig.gateway.finished for choice in submission.choices))
    for choice in submission.choices:
        truth = generate(submission.tokens, submission.sampling, choice, submission.sampling.max_tokens)
        assert rig.gateway.tokens[handle, choice] == truth
        assert rig.gateway.finished[handle, choice] is FinishReason.LENGTH


@pytest.fixture(autouse=True, params=[False, True], ids=["plain", "overlapped"])
def _both_loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_rigs, "OVERLAP", request.param)


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull_module, "CANCEL_GRACE_S", 0.01)


@pytest.fixture
def short_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests whose reads stall; elsewhere one that is late for a moment must not count as stalled."""
    monkeypatch.setattr(reading, "MIN_STALL_S", 0.05)


# -- pulls that go well -----------------------------------------------------------------------------------------------


async def test_a_prompt_is_pulled_chunk_by_chunk_while_its_owner_computes() -> None:
    async with decode_rig() as rig:
        submission = pulled(choices=(0, 1))
        owner = start(rig, submission)
        owner.ready(0, 1)
        await until(lambda: len(rig.peers.the_link.flights) == 1)
        assert await rig.ledger() == "free=13 landing=3"
        owner.ready(1, 3)
        await until(lambda: len(rig.peers.the_link.flights) == 2)
        reads = rig.peers.the_link.flights[1][0]
        assert [(r.source_block, r.source_address, r.generation) for r in reads] == [(1, 1000, 71), (2, 2000, 72)]
        assert [r.target_block for r in reads] == [1, 2]
        owner.done()
        rig.peers.the_link.finish(submission.tokens, at=1)
        rig.peers.the_link.finish(submission.tokens)
        await check_answer(rig, submission)
        await rig.until_idle()
        assert not owner.is_open
        assert owner.terms is not None
        assert (owner.terms.needer_id, owner.terms.needer_epoch, owner.terms.ticket) == ("d", 9, b"t")
        report = rig.gateway.reports[0]
        assert (report.transport, report.transfer_bytes) == ("stream", 3 * 256)
        assert report.transfer_s > 0


async def test_the_owner_keeps_its_blocks_until_the_last_read_has_settled() -> None:
    async with decode_rig() as rig:
        submission = pulled()
        owner = start(rig, submission)
        owner.all_ready()
        await until(lambda: rig.peers.the_link.flights)
        await asyncio.sleep(0.01)
        assert owner.is_open
        rig.peers.the_link.finish(submission.tokens)
        await check_answer(rig, submission)
        assert not owner.is_open


async def test_what_is_cached_here_is_not_read() -> None:
    async with decode_rig() as rig:
        rig.submit(make_submission(1, sampling=FOUR))
        await until(lambda: (1, 0) in rig.gateway.finished)
        submission = pulled(2)
        owner = start(rig, submission)
        owner.all_ready()
        await until(lambda: rig.peers.the_link.flights)
        assert [r.source_block for r in rig.peers.the_link.flights[0][0]] == [2]
        rig.peers.the_link.finish(submission.tokens)
        await check_answer(rig, submission)
        await rig.until_idle()


async def test_a_local_request_needs_no_owner() -> None:
    async with decode_rig(budget=3) as rig:
        submission = make_submission(1, sampling=FOUR, choices=(0, 1))
        assert rig.swap_cost.prefill_s(0, 4) == 0
        rig.submit(submission)
        await check_answer(rig, submission)
        await rig.until_idle()
        assert rig.gateway.reports[0].prefill_s > 0
        assert rig.swap_cost.prefill_s(0, 4) > 0, "what a prefill takes here is what giving way is weighed against"


# -- pulls that do not ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", [ReadOutcome.STALE, ReadOutcome.FAILED])
async def test_a_bad_read_is_computed_here(outcome: ReadOutcome) -> None:
    async with decode_rig() as rig:
        submission = pulled()
        owner = start(rig, submission)
        owner.ready(0, 2)
        await until(lambda: len(rig.peers.the_link.flights) == 1)
        owner.ready(2, 3)
        owner.done()
        await until(lambda: len(rig.peers.the_link.flights) == 2)
        rig.peers.the_link.finish(submission.tokens, outcome)
        rig.peers.the_link.finish(submission.tokens)
        await check_answer(rig, submission)
        await rig.until_idle()
        assert rig.gateway.reports[0].transport == ""


@pytest.mark.usefixtures("short_stall")
async def test_a_stalled_read_keeps_its_blocks_and_the_request_gets_others() -> None:
    async with decode_rig() as rig:
        submission = pulled()
        owner = start(rig, submission)
        owner.all_ready()
        await check_answer(rig, submission)
        await until(lambda: rig.attachments.num_legs == 0)
        assert await rig.ledger() == "free=10 cached=3 quarantined=3"
        rig.peers.the_link.finish(submission.tokens)
        await rig.until_idle()


@pytest.mark.parametrize("error", [WorkerLostError("gone"), NotFoundError("forgotten"), None])
async def test_an_owner_that_breaks_off_is_replaced_by_computing_here(error: Exception | None) -> None:
    async with decode_rig() as rig:
        submission = pulled()
        owner = start(rig, submission)
        owner.ready(0, 2)
        await until(lambda: rig.peers.the_link.flights)
        owner.events.put_nowait(error)
        await until(lambda: (1, 0) in rig.gateway.finished)
        rig.peers.the_link.finish(submission.tokens)
        await check_answer(rig, submission)
        await rig.until_idle()


@pytest.mark.parametrize("gap", ["skipped", "repeated", "short", "too many", "no first token"])
async def test_an_owner_that_tells_wrong_things_is_not_believed(gap: str) -> None:
    async with decode_rig() as rig:
        submission = pulled(choices=(0, 1))
        owner = start(rig, submission)
        if gap == "skipped":
            owner.ready(1, 3)
        elif gap == "repeated":
            owner.ready(0, 2)
            owner.ready(1, 3)
        elif gap == "short":
            owner.ready(0, 2)
        elif gap == "too many":
            owner.ready(0, 4)
        else:
            owner.ready(0, 3)
            owner.submission = pulled(choices=(0,))
        owner.done()
        await check_answer(rig, submission)
        while rig.peers.the_link.flights:
            rig.peers.the_link.finish(submission.tokens)
        await rig.until_idle()


async def test_a_wrong_configuration_fails_the_request() -> None:
    async with decode_rig() as rig:
        owner = start(rig, pulled())
        owner.events.put_nowait(LayoutMismatchError("kv_dtype: owner=float16 needer=float32"))
        await until(lambda: rig.gateway.failed)
        assert rig.gateway.failed[0].error.code is ErrorCode.LAYOUT_MISMATCH
        await rig.until_idle()


async def test_a_defect_of_ours_fails_the_request_and_leaks_nothing() -> None:
    async with decode_rig() as rig:
        submission = pulled()
        owner = start(rig, submission)
        owner.ready(0, 2)
        await until(lambda: rig.peers.the_link.flights)
        owner.events.put_nowait(ZeroDivisionError("a defect"))
        await until(lambda: rig.gateway.failed)
        assert rig.gateway.failed[0].error.code is ErrorCode.INTERNAL
        assert await rig.ledger() == "free=14 landing=2"
        rig.peers.the_link.finish(submission.tokens)
        await rig.until_idle()


async def test_a_refused_booking_is_told_and_the_next_request_is_fine() -> None:
    async with decode_rig(num_blocks=4) as rig:
        first = pulled(1)
        owner = start(rig, first)
        second = start(rig, pulled(2))
        await until(lambda: rig.gateway.failed)
        failure = rig.gateway.failed[0]
        assert (failure.handle, failure.error.code) == (2, ErrorCode.OVERLOADED)
        assert failure.error.retry_after_s > 0
        assert second.terms is None
        owner.all_ready()
        await until(lambda: rig.peers.the_link.flights)
        rig.peers.the_link.finish(first.tokens)
        await check_answer(rig, first)
        await rig.until_idle()


async def test_a_prompt_that_the_pool_cannot_hold_is_refused() -> None:
    async with decode_rig(num_blocks=2) as rig:
        rig.submit(make_submission(1))
        rig.submit(pulled(2))
        await until(lambda: len(rig.gateway.failed) == 2)
        assert {f.error.code for f in rig.gateway.failed} == {ErrorCode.INVALID_REQUEST}
        await rig.until_idle()


# -- cancels ----------------------------------------------------------------------------------------------------------

MOMENTS = ["at once", "meeting", "lending", "granting", "reading", "partly landed", "settled", "decoding", "grace"]


async def reach(rig: DecodeRig, submission: Submission, moment: str) -> list[int]:
    """Bring a pull to the await where it is to be cancelled. Returns blocks that the test itself took meanwhile."""
    owner = rig.start_owner(submission)
    if moment == "meeting":
        rig.peers.meeting = asyncio.get_running_loop().create_future
    rig.submit(submission)
    if moment in ("at once", "meeting"):
        await asyncio.sleep(0.01 if moment == "meeting" else 0)
        return []
    await until(lambda: owner.is_open)
    taken = await rig.engine.call(rig.pool.allocate, 14) if moment == "granting" else None
    if moment == "grace":
        owner.events.put_nowait(NotFoundError("forgotten"))
        await until(lambda: not owner.is_open)
    elif moment != "lending":
        owner.ready(0, 1)
        owner.ready(1, 3)
        owner.done()
    if moment in ("reading", "partly landed", "settled", "decoding"):
        await until(lambda: len(rig.peers.the_link.flights) == 2)
    if moment in ("partly landed", "settled", "decoding"):
        rig.peers.the_link.finish(submission.tokens)
    if moment in ("settled", "decoding"):
        rig.peers.the_link.finish(submission.tokens)
    if moment == "decoding":
        await until(lambda: (submission.handle, 0) in rig.gateway.tokens)
    if moment == "partly landed":
        await rig.until_ledger("free", "active", "landing")
    if moment == "granting":
        await asyncio.sleep(0.01)
        assert await rig.ledger() == "free=2 active=14"
    return taken or []


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("moment", MOMENTS)
async def test_cancelled_at_any_moment_nothing_is_held(
    moment: str, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if moment == "grace":
        monkeypatch.setattr(pull_module, "CANCEL_GRACE_S", 0.05)
    async with decode_rig() as rig:
        submission = pulled(choices=(0, 1), sampling=SamplingParams(max_tokens=50, ignore_eos=True, seed=3))
        taken = await reach(rig, submission, moment)
        flying = len(rig.peers.the_link.flights)
        if whole:
            rig.cancel(1)
        else:
            rig.cancel(1, (0,))
            rig.cancel(1, (1,))
        await until(lambda: rig.attachments.num_legs == 0)
        await until(lambda: not rig.service._tasks)
        assert not rig.peers.owners["r1"].is_open
        rig.engine.post(rig.pool.release, taken)
        if flying:
            await rig.until_ledger("free", "landing", "cached")
            assert "landing" in await rig.ledger(), "a read in flight keeps its blocks"
        while rig.peers.the_link.flights:
            rig.peers.the_link.finish(submission.tokens)
        await rig.until_idle()


async def test_a_choice_cancelled_before_the_pull_began_does_not_run() -> None:
    async with decode_rig() as rig:
        submission = pulled(choices=(0, 1))
        owner = rig.start_owner(submission)
        rig.submit(submission)
        rig.cancel(1, (0,))
        owner.all_ready()
        await until(lambda: rig.peers.the_link.flights)
        rig.peers.the_link.finish(submission.tokens)
        await until(lambda: (1, 1) in rig.gateway.finished)
        await rig.until_idle()
        assert (1, 0) not in rig.gateway.tokens


async def test_the_deadline_ends_a_pull_whose_owner_says_nothing() -> None:
    async with decode_rig() as rig:
        owner = start(rig, pulled(deadline_s=0.05))
        await until(lambda: rig.gateway.failed)
        assert rig.gateway.failed[0].error.code is ErrorCode.DEADLINE_EXCEEDED
        await rig.until_idle()
        assert not owner.is_open


async def test_without_its_last_choice_a_pull_whose_session_closes_is_given_back() -> None:
    """The choices are dropped one by one; before the engine has said that this was all, the gateway goes."""
    async with decode_rig() as rig:
        submission = pulled()
        owner = start(rig, submission)
        owner.ready(0, 3)
        await until(lambda: rig.peers.the_link.flights)
        rig.cancel(1, (0,))
        rig.attachments.close(rig.gateway.session)
        await until(lambda: not rig.service._tasks)
        rig.peers.the_link.finish(submission.tokens)
        await rig.until_idle()


async def test_holdings_say_who_waits_for_what() -> None:
    async with decode_rig() as rig:
        owner = start(rig, pulled())
        owner.ready(0, 1)
        await until(lambda: rig.peers.the_link.flights)
        holding = (await rig.engine.call(rig.worker.holdings))[0]
        assert (holding.holder, holding.state, holding.blocks) == ("r1/0", HoldingState.LANDING, (0, 1, 2))
        rig.cancel(1)
        await until(lambda: rig.attachments.num_legs == 0)
        rig.peers.the_link.finish(pulled().tokens)
        await rig.until_idle()


async def test_many_at_once_in_a_small_pool_all_get_their_answers() -> None:
    async with decode_rig(num_blocks=12, max_num_seqs=3) as rig:
        submissions = [make_submission(h, tokens=list(range(h * 20, h * 20 + 10)), sampling=FOUR) for h in range(1, 9)]
        for submission in submissions:
            rig.submit(submission)
        for submission in submissions:
            await check_answer(rig, submission)
        await rig.until_idle()


async def test_a_row_without_numbers_fails_its_request_alone() -> None:
    async with decode_rig() as rig:
        prompt = make_submission(9).tokens
        rig.runner.bad.add((1, len(prompt) + 2))
        rig.submit(make_submission(1, sampling=FOUR, choices=(0, 1)))
        other = make_submission(2, sampling=FOUR)
        rig.submit(other)
        await until(lambda: rig.gateway.failed)
        await check_answer(rig, other)
        assert [(failure.handle, failure.error.code) for failure in rig.gateway.failed] == [(1, ErrorCode.INTERNAL)]
        assert len(rig.gateway.tokens[1, 1]) == 2, "what meant nothing was not told"
        await rig.until_idle()


@pytest.mark.parametrize("number", range(4))
async def test_an_end_that_nobody_saw_coming_leaves_nothing_behind(number: int) -> None:
    """A stop token ends a sequence whose next row may be launched already."""
    async with decode_rig() as rig:
        plain = make_submission(1).tokens
        sampling = SamplingParams(max_tokens=30, ignore_eos=True, seed=3)
        truth = generate(plain, sampling, 0, 12)
        at = next(i for i in range(2 + number, 12) if truth[i] not in truth[:i])
        rig.submit(make_submission(1, sampling=replace(sampling, stop_token_ids=(truth[at],))))
        other = make_submission(2, sampling=FOUR)
        rig.submit(other)
        await check_answer(rig, other)
        await until(lambda: (1, 0) in rig.gateway.finished)
        assert rig.gateway.tokens[1, 0] == truth[: at + 1]
        assert rig.gateway.finished[1, 0] is FinishReason.STOP
        await rig.until_idle()

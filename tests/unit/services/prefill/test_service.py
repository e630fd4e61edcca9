"""A prefill worker without model and network: what its gateway and its needers see, and what is left on the ledger."""

import asyncio
import contextlib
import threading
from collections.abc import Callable

import pytest

from tailrace.errors import ErrorCode, NotFoundError
from tailrace.kv.block_pool import BlockState
from tailrace.messages import HoldingState, LendDone, LendTerms, LentBlocks
from tailrace.rpc.auth import sign_ticket
from tailrace.types import FinishReason, SamplingParams
from tests.helpers import worker_rigs
from tests.helpers.fake_runner import digests, generate
from tests.helpers.values import SECRET, make_submission
from tests.helpers.waiting import until
from tests.helpers.worker_rigs import POOL_ADDRESS, PrefillRig, prefill_rig


def terms(request_id: str) -> LendTerms:
    return LendTerms(request_id, 0, sign_ticket(SECRET, request_id, 0, "w", 7), "d", 9, "stream")


async def borrow(rig: PrefillRig, request_id: str) -> tuple[list[LentBlocks], LendDone]:
    """Everything that a needer is told; gives the blocks back."""
    lent: list[LentBlocks] = []
    async with contextlib.aclosing(rig.lender.lend(terms(request_id))) as events:
        async for event in events:
            if isinstance(event, LendDone):
                return lent, event
            lent.append(event)
    raise AssertionError("a lend ends with done")


@pytest.fixture(autouse=True, params=[False, True], ids=["plain", "overlapped"])
def _both_loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_rigs, "OVERLAP", request.param)


async def test_the_first_token_goes_to_the_gateway_and_the_blocks_to_the_needer() -> None:
    async with prefill_rig(budget=4) as rig:
        submission = make_submission(1, choices=(0, 1))
        rig.submit(submission)
        lent, done = await borrow(rig, "r1")
        tokens = [generate(submission.tokens, submission.sampling, choice, 1)[0] for choice in (0, 1)]
        await until(lambda: rig.gateway.reports)
        assert rig.gateway.tokens == {(1, 0): [tokens[0]], (1, 1): [tokens[1]]}
        assert [token.token_id for token in done.first_tokens] == tokens
        assert (done.last_block_tokens, done.cached_tokens) == (2, 0)
        told = [(block, address) for e in lent for block, address in zip(e.blocks, e.addresses, strict=True)]
        assert [block for block, _ in told] == [0, 1, 2]
        assert [address for _, address in told] == [POOL_ADDRESS + 256 * block for block, _ in told]
        assert [g for e in lent for g in e.generations] == [rig.pool.generation(block) for block in (0, 1, 2)]
        kept = [value for block, _ in told for value in rig.runner.read(block)][:10]
        assert kept == digests(submission.tokens)
        await rig.until_idle()
        assert await rig.ledger() == "free=14 cached=2"


async def test_blocks_stay_lent_until_the_needer_closes_its_stream() -> None:
    async with prefill_rig() as rig:
        rig.submit(make_submission(1))
        events = rig.lender.lend(terms("r1"))
        assert isinstance(await anext(events), LentBlocks)
        assert isinstance(await anext(events), LendDone)
        assert await rig.ledger() == "free=13 lent=3"
        holding = (await rig.engine.call(rig.worker.holdings))[0]
        assert (holding.holder, holding.state, holding.blocks) == ("r1/0", HoldingState.LENT, (0, 1, 2))
        await events.aclose()
        await rig.until_idle()


async def test_a_first_token_that_ends_its_choice_is_told_with_its_reason() -> None:
    async with prefill_rig() as rig:
        rig.submit(make_submission(1, sampling=SamplingParams(max_tokens=1)))
        _, done = await borrow(rig, "r1")
        assert done.first_tokens[0].finish_reason is not None
        await until(lambda: rig.gateway.finished)
        assert rig.gateway.finished[1, 0] in (FinishReason.LENGTH, FinishReason.STOP)


async def test_cached_tokens_are_told() -> None:
    async with prefill_rig() as rig:
        rig.submit(make_submission(1))
        await borrow(rig, "r1")
        rig.submit(make_submission(2))
        _, done = await borrow(rig, "r2")
        assert done.cached_tokens == 8
        await until(lambda: len(rig.gateway.reports) == 2)
        assert rig.gateway.reports[1].cached_by_tier == {"worker": 8}


@pytest.mark.parametrize("moment", ["waiting", "running", "held", "lending"])
async def test_cancelled_at_any_moment_nothing_is_held(moment: str) -> None:
    async with prefill_rig(num_blocks=8, budget=4) as rig:
        gate = await _hold(rig, steps=1 if moment == "running" else 0)
        if moment == "waiting":
            rig.submit(make_submission(5, tokens=list(range(500, 532))))
        rig.submit(make_submission(1))
        reading = asyncio.create_task(borrow(rig, "r1")) if moment == "lending" else None
        if moment in ("held", "lending"):
            gate()
        if moment == "held":
            await rig.until_ledger("free", "lent")
        await asyncio.sleep(0.01)
        rig.cancel(1)
        rig.cancel(5)
        gate()
        if reading is not None:
            with contextlib.suppress(NotFoundError):
                await reading
        await rig.until_idle()
        assert rig.lender.num_open == 0


async def _hold(rig: PrefillRig, *, steps: int) -> Callable[[], None]:
    """The engine stands still after so many steps until the gate is called."""
    gate = threading.Event()
    compute = rig.runner._compute_plan
    left = [steps]

    def slow(plan: object) -> object:
        if not left[0]:
            gate.wait(3)
        left[0] = max(0, left[0] - 1)
        return compute(plan)  # type: ignore[arg-type]

    rig.runner._compute_plan = slow  # type: ignore[method-assign, assignment]
    return gate.set


async def test_a_lost_gateway_takes_its_requests_along() -> None:
    async with prefill_rig() as rig:
        for handle in range(1, 5):
            rig.submit(make_submission(handle))
        await asyncio.sleep(0.01)
        rig.attachments.close(rig.gateway.session)
        await rig.until_idle()


async def test_a_needer_of_a_cancelled_request_is_told() -> None:
    async with prefill_rig() as rig:
        rig.submit(make_submission(1))
        events = rig.lender.lend(terms("r1"))
        assert isinstance(await anext(events), LentBlocks)
        assert isinstance(await anext(events), LendDone)
        rig.cancel(1)
        with pytest.raises(StopAsyncIteration):
            await anext(events)
        await rig.until_idle()


async def test_a_prompt_that_the_pool_cannot_hold_is_refused() -> None:
    async with prefill_rig(num_blocks=2) as rig:
        rig.submit(make_submission(1))
        await until(lambda: rig.gateway.failed)
        assert rig.gateway.failed[0].error.code is ErrorCode.INVALID_REQUEST
        await rig.until_idle()
        rig.submit(make_submission(2, tokens=[1, 2, 3], num_prompt_tokens=3))
        await borrow(rig, "r2")


async def test_a_prompt_without_numbers_fails_alone() -> None:
    async with prefill_rig() as rig:
        rig.runner.bad.add((1, 10))
        rig.submit(make_submission(1, choices=(0, 1)))
        rig.submit(make_submission(2))
        await until(lambda: rig.gateway.failed)
        assert [failure.handle for failure in rig.gateway.failed] == [1]
        assert rig.gateway.failed[0].error.code is ErrorCode.INTERNAL
        await borrow(rig, "r2")
        await rig.until_idle()


async def test_a_cancelled_choice_changes_nothing() -> None:
    async with prefill_rig() as rig:
        rig.submit(make_submission(1, choices=(0, 1)))
        rig.cancel(1, (0,))
        _, done = await borrow(rig, "r1")
        assert len(done.first_tokens) == 2
        assert rig.pool.state(0) is not BlockState.FREE

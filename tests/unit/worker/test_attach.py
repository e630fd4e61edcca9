import asyncio
from collections.abc import AsyncIterator

import pytest

from tailrace.errors import ErrorCode, InternalError, OverloadedError, TailraceError
from tailrace.kv.events import KVEvent, KVEventKind
from tailrace.messages import ChoiceFinished, LegFailed, LegReport, Load, OwnerRate, StepEvents, TokenColumns
from tailrace.types import FinishReason
from tailrace.worker import attach
from tailrace.worker.attach import Attachments, Leg, Session
from tailrace.worker.report import StepReport
from tests.helpers.values import make_info, make_submission


class Handler:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.legs: list[Leg] = []
        self.cancelled: list[tuple[int, tuple[int, ...]]] = []
        self.refusal: TailraceError | None = None

    def begin(self, leg: Leg) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.legs.append(leg)

    def cancel(self, leg: Leg, choices: tuple[int, ...]) -> None:
        self.cancelled.append((leg.id, choices))


def make() -> tuple[Attachments, Handler]:
    handler = Handler()
    return Attachments(make_info(), handler, steps=lambda: 42), handler


async def greeted(session: Session) -> AsyncIterator[StepEvents]:
    events = session.events()
    assert (await anext(events)).info == session.info
    return events


def tokens(*rows: tuple[int, int, int, int]) -> TokenColumns:
    columns = TokenColumns()
    for row in rows:
        columns.add(*row, None)
    return columns


async def test_a_session_begins_with_who_we_are() -> None:
    attachments, _ = make()
    first = await anext(attachments.open("g", 1).events())
    assert (first.epoch, first.step, first.info, first.load) == (7, 42, attachments.info, Load())


async def test_steps_are_coalesced_until_the_stream_takes_them() -> None:
    attachments, handler = make()
    session = attachments.open("g", 1)
    events = await greeted(session)
    attachments.submit(session, make_submission(9))
    leg = handler.legs[0].id
    attachments.deliver(StepReport(tokens=tokens((leg, 0, 10, 5))))
    attachments.deliver(
        StepReport(
            tokens=tokens((leg, 0, 11, 6)),
            finished=[ChoiceFinished(leg, 0, FinishReason.LENGTH)],
            reports=[LegReport(leg, decode_s=1.0)],
            ended=[leg],
        )
    )
    said = await anext(events)
    assert (said.tokens.handles, said.tokens.positions, said.tokens.token_ids) == ([9, 9], [10, 11], [5, 6])
    assert said.finished == [ChoiceFinished(9, 0, FinishReason.LENGTH)]
    assert said.reports == [LegReport(9, decode_s=1.0)]
    assert attachments.num_legs == 0
    assert session.legs == {}


async def test_each_gateway_hears_of_its_own_legs_only_by_its_own_handles() -> None:
    attachments, handler = make()
    sessions = [attachments.open(name, 1) for name in ("g", "h")]
    streams = [await greeted(session) for session in sessions]
    for session in sessions:
        attachments.submit(session, make_submission(1))
    first, second = (leg.id for leg in handler.legs)
    attachments.deliver(StepReport(tokens=tokens((first, 0, 10, 5), (second, 0, 10, 6))))
    said = [await anext(stream) for stream in streams]
    assert [(e.tokens.handles, e.tokens.token_ids) for e in said] == [([1], [5]), ([1], [6])]


async def test_a_beat_when_there_is_nothing_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach, "BEAT_S", 0.02)
    monkeypatch.setattr(attach, "LOAD_S", 0.0)
    attachments, _ = make()
    events = await greeted(attachments.open("g", 1))
    async with asyncio.timeout(10):
        beat = await anext(events)
    assert (beat.step, beat.load, beat.tokens.handles) == (42, Load(), [])


async def test_rates_of_owners_are_told_when_they_change_and_to_whoever_attaches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attach, "BEAT_S", 0.001)
    monkeypatch.setattr(attach, "LOAD_S", 0.0)
    rates = (OwnerRate("p0", 1e9),)
    attachments = Attachments(make_info(), Handler(), steps=lambda: 1, owners=lambda: rates)
    events = attachments.open("g", 1).events()

    async def owners(events: AsyncIterator[StepEvents]) -> tuple[OwnerRate, ...] | None:
        load = (await anext(events)).load
        assert load is not None
        return load.owners

    assert [await owners(events) for _ in range(3)] == [rates, None, None]
    rates = (OwnerRate("p0", 1e8), OwnerRate("p1", 1e9))
    assert [await owners(events) for _ in range(2)] == [rates, None]
    assert await owners(attachments.open("h", 1).events()) == rates
    rates = ()
    assert [await owners(events) for _ in range(2)] == [(), None]


async def test_a_new_stream_of_a_gateway_fences_the_old_one() -> None:
    attachments, handler = make()
    old = attachments.open("g", 1)
    events = await greeted(old)
    attachments.submit(old, make_submission(1))
    new = attachments.open("g", 2)
    assert handler.cancelled == [(handler.legs[0].id, ())]
    assert [len([e async for e in events]), attachments.num_legs] == [1, 0]
    attachments.submit(new, make_submission(1))
    attachments.close(old)
    assert attachments.num_legs == 1, "the late end of the old stream must not touch the new one"


async def test_a_closed_stream_cancels_what_came_over_it_even_after_its_fencing() -> None:
    attachments, handler = make()
    session = attachments.open("g", 1)
    for handle in (1, 2):
        attachments.submit(session, make_submission(handle))
    attachments.close(session)
    assert handler.cancelled == [(leg.id, ()) for leg in handler.legs]
    attachments.submit(session, make_submission(3))
    attachments.close(session)
    assert len(handler.cancelled) == 3
    assert attachments.num_legs == 0


async def test_what_was_said_before_the_end_is_still_sent() -> None:
    attachments, _ = make()
    session = attachments.open("g", 1)
    events = await greeted(session)
    session.add_failure(5, InternalError("late"))
    session.close()
    assert [[failure.handle for failure in e.failed] async for e in events] == [[5]]


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"tokens": list(range(64)), "num_prompt_tokens": 64}, ErrorCode.INVALID_REQUEST, "token_ids"),
        ({"handle": 1}, ErrorCode.INVALID_REQUEST, "handle"),
    ],
)
async def test_a_refusal_is_an_event(fields: dict[str, object], code: ErrorCode, param: str) -> None:
    attachments, handler = make()
    session = attachments.open("g", 1)
    events = await greeted(session)
    attachments.submit(session, make_submission(1))
    attachments.submit(session, make_submission(**{"handle": 2, **fields}))
    failure = (await anext(events)).failed[0].error
    assert (failure.code, failure.param, len(handler.legs)) == (code, param, 1)


async def test_the_longest_prompt_that_leaves_room_for_a_token_is_taken() -> None:
    attachments, handler = make()
    attachments.submit(attachments.open("g", 1), make_submission(1, tokens=list(range(63))))
    assert len(handler.legs) == 1


async def test_a_draining_worker_refuses_and_says_so() -> None:
    attachments, handler = make()
    session = attachments.open("g", 1)
    events = await greeted(session)
    attachments.is_draining = True
    attachments.submit(session, make_submission(1))
    said = await anext(events)
    assert (said.failed[0].error.code, handler.legs) == (ErrorCode.UNAVAILABLE, [])
    assert attachments.load.draining


async def test_a_handler_that_refuses_leaves_nothing_behind() -> None:
    attachments, handler = make()
    session = attachments.open("g", 1)
    events = await greeted(session)
    handler.refusal = OverloadedError("full", retry_after_s=2.0)
    attachments.submit(session, make_submission(4))
    failed = (await anext(events)).failed
    assert [(f.handle, f.error.retry_after_s) for f in failed] == [(4, 2.0)]
    assert (attachments.num_legs, session.legs) == (0, {})


async def test_a_deadline_ends_a_leg_with_an_error() -> None:
    attachments, handler = make()
    session = attachments.open("g", 1)
    events = await greeted(session)
    attachments.submit(session, make_submission(1, deadline_s=0.01))
    async with asyncio.timeout(10):
        failed = (await anext(events)).failed
    assert failed[0].error.code is ErrorCode.DEADLINE_EXCEEDED
    assert handler.cancelled == [(handler.legs[0].id, ())]
    assert attachments.num_legs == 0


async def test_a_leg_that_ended_has_no_deadline_any_more() -> None:
    attachments, handler = make()
    session = attachments.open("g", 1)
    attachments.submit(session, make_submission(1, deadline_s=0.01))
    attachments.deliver(StepReport(ended=[handler.legs[0].id]))
    await asyncio.sleep(0.03)
    assert handler.cancelled == []


async def test_cancels_of_a_choice_of_a_leg_and_of_nobody() -> None:
    attachments, handler = make()
    session = attachments.open("g", 1)
    attachments.submit(session, make_submission(1, choices=(0, 1)))
    leg = handler.legs[0].id
    attachments.cancel(session, 1, (1,))
    assert attachments.num_legs == 1
    attachments.cancel(session, 1, ())
    attachments.cancel(session, 1, ())
    attachments.cancel(session, 77, ())
    assert handler.cancelled == [(leg, (1,)), (leg, ())]


async def test_news_of_a_leg_that_is_gone_is_dropped() -> None:
    attachments, handler = make()
    session = attachments.open("g", 1)
    events = await greeted(session)
    attachments.submit(session, make_submission(1))
    leg = handler.legs[0].id
    attachments.cancel(session, 1, ())
    attachments.deliver(
        StepReport(
            tokens=tokens((leg, 0, 10, 5)),
            finished=[ChoiceFinished(leg, 0, FinishReason.STOP)],
            failed=[LegFailed(leg, InternalError("x"))],
            reports=[LegReport(leg)],
            ended=[leg],
        )
    )
    session.close()
    said = [e async for e in events]
    assert [(e.tokens.handles, e.finished, e.failed, e.reports) for e in said] == [([], [], [], [])]


async def test_kv_events_are_numbered_across_steps_and_coalesced() -> None:
    attachments, _ = make()
    first = attachments.open("g", 1)
    events = await greeted(first)
    changes = [KVEvent(KVEventKind.PUBLISH, bytes([at]) * 16) for at in range(4)]
    attachments.deliver(StepReport(kv_events=changes[:2]))
    late = await greeted(attachments.open("h", 1))
    attachments.deliver(StepReport())
    attachments.deliver(StepReport(kv_events=changes[2:3]))
    batch = (await anext(events)).kv_events
    assert batch is not None
    assert (batch.epoch, batch.first_sequence, list(batch.events)) == (7, 0, changes[:3])
    seen_late = (await anext(late)).kv_events
    assert seen_late is not None
    assert (seen_late.first_sequence, list(seen_late.events)) == (2, changes[2:3])
    attachments.deliver(StepReport(kv_events=changes[3:]))
    batch = (await anext(events)).kv_events
    assert batch is not None
    assert batch.first_sequence == 3
    assert attachments.kv_sequence == 4

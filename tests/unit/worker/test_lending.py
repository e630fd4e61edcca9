import asyncio
import contextlib
from collections.abc import AsyncGenerator

import pytest

from tailrace.errors import NotFoundError, TailraceError, UnauthenticatedError
from tailrace.messages import LendDone, LendTerms, LentBlocks
from tailrace.rpc.auth import sign_ticket
from tailrace.worker import lending
from tailrace.worker.lending import Lender
from tailrace.worker.report import LendProgress
from tests.helpers.values import SECRET
from tests.helpers.waiting import until

DONE = LendDone((), 2, 0, 0.0, 0.0)


class Books:
    """What the engine would hear."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.given_back: list[int] = []
        self.lender = Lender(
            secret=SECRET,
            worker_id="p",
            epoch=3,
            ask_progress=self.asked.append,
            gave_back=self.given_back.append,
        )

    def lend(self, **fields: object) -> AsyncGenerator[LentBlocks | LendDone, None]:
        return self.lender.lend(terms(**fields))

    def ready(self, count: int, *, first: int = 0, done: bool = False) -> None:
        self.lender.deliver([LendProgress(1, blocks(first, count), DONE if done else None)])


def terms(**fields: object) -> LendTerms:
    values: dict[str, object] = {
        "request_id": "r",
        "attempt": 0,
        "ticket": sign_ticket(SECRET, "r", 0, "p", 3),
        "needer_id": "d",
        "needer_epoch": 9,
        "transport": "stream",
    }
    return LendTerms(**{**values, **fields})  # type: ignore[arg-type]


def blocks(first: int, end: int) -> LentBlocks:
    ids = range(first, end)
    return LentBlocks(first, [50 + i for i in ids], [1000 + i for i in ids], [7000 + i for i in ids])


@pytest.mark.parametrize(
    "fields",
    [
        {"ticket": b""},
        {"ticket": sign_ticket(b"another secret", "r", 0, "p", 3)},
        {"ticket": sign_ticket(SECRET, "r", 0, "p", 2)},
        {"ticket": sign_ticket(SECRET, "r", 0, "q", 3)},
        {"request_id": "s"},
        {"attempt": 1},
    ],
)
async def test_a_ticket_is_for_one_attempt_of_one_request_and_one_life(fields: dict[str, object]) -> None:
    books = Books()
    books.lender.admit("r", 0, 1)
    with pytest.raises(UnauthenticatedError):
        await anext(books.lend(**fields))
    assert (books.lender.num_open, books.asked, books.given_back) == (0, [], [])


async def test_each_block_is_told_once_however_often_progress_repeats() -> None:
    books = Books()
    books.lender.admit("r", 0, 1)
    events = books.lend()
    first = asyncio.create_task(anext(events))
    await until(lambda: books.asked == [1])
    books.ready(2)
    assert await first == blocks(0, 2)
    books.ready(2)
    books.ready(3)
    assert await anext(events) == blocks(2, 3)
    books.ready(4, done=True)
    assert [await anext(events), await anext(events)] == [blocks(3, 4), DONE]
    await events.aclose()
    assert (books.given_back, books.lender.num_open) == ([1], 0)


async def test_blocks_that_the_needer_has_are_skipped() -> None:
    books = Books()
    books.lender.admit("r", 0, 1)
    events = books.lend(skip_blocks=2)
    told = asyncio.create_task(anext(events))
    await until(lambda: books.asked)
    books.ready(2)
    books.ready(4)
    assert await told == blocks(2, 4)
    await events.aclose()


@pytest.mark.parametrize(("skip_blocks", "told"), [(0, blocks(3, 6)), (4, blocks(4, 6))])
async def test_what_the_owner_no_longer_holds_is_never_told(skip_blocks: int, told: LentBlocks) -> None:
    books = Books()
    books.lender.admit("r", 0, 1)
    events = books.lend(skip_blocks=skip_blocks)
    first = asyncio.create_task(anext(events))
    await until(lambda: books.asked)
    books.ready(6, first=3)
    assert await first == told
    books.ready(7, first=5, done=True)
    assert [await anext(events), await anext(events)] == [blocks(6, 7), DONE]
    await events.aclose()


async def test_a_needer_may_come_before_its_request() -> None:
    books = Books()
    events = books.lend()
    told = asyncio.create_task(anext(events))
    await asyncio.sleep(0.01)
    assert books.asked == []
    books.lender.admit("r", 0, 1)
    await until(lambda: books.asked == [1])
    books.ready(1)
    assert await told == blocks(0, 1)
    await events.aclose()


async def test_a_request_that_never_comes_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lending, "ARRIVAL_S", 0.01)
    books = Books()
    with pytest.raises(NotFoundError, match="did not arrive"):
        await anext(books.lend())
    assert not books.lender._arrivals


async def test_one_of_two_early_needers_that_leaves_does_not_make_the_other_miss_the_request() -> None:
    books = Books()
    streams = [books.lend(), books.lend()]
    waiting = [asyncio.create_task(anext(stream)) for stream in streams]
    await asyncio.sleep(0.01)
    waiting[0].cancel()
    await asyncio.gather(waiting[0], return_exceptions=True)
    books.lender.admit("r", 0, 1)
    await until(lambda: books.asked == [1])
    books.ready(1)
    assert await waiting[1] == blocks(0, 1)
    await streams[1].aclose()


async def test_a_second_needer_is_refused_and_takes_nothing_from_the_first() -> None:
    books = Books()
    books.lender.admit("r", 0, 1)
    first = books.lend()
    told = asyncio.create_task(anext(first))
    await until(lambda: books.asked)
    with pytest.raises(UnauthenticatedError, match="in use"):
        await anext(books.lend())
    assert (books.given_back, books.lender.num_open) == ([], 1)
    books.ready(1)
    await told
    await first.aclose()


async def test_a_request_that_ends_early_ends_the_lend() -> None:
    books = Books()
    books.lender.admit("r", 0, 1)
    told = asyncio.create_task(anext(books.lend()))
    await until(lambda: books.asked)
    books.lender.forget(1)
    books.lender.forget(1)
    with pytest.raises(NotFoundError, match="ended"):
        await told
    assert (books.given_back, books.lender.num_open) == ([1], 0)
    assert not books.lender._requests


async def test_after_the_last_block_the_lend_stays_open_until_the_request_is_gone() -> None:
    books = Books()
    books.lender.admit("r", 0, 1)
    heard: list[object] = []

    async def read() -> None:
        async for event in books.lend():
            heard.append(event)

    reading = asyncio.create_task(read())
    await until(lambda: books.asked)
    books.ready(1, done=True)
    await until(lambda: len(heard) == 2)
    assert books.given_back == []
    books.lender.forget(1)
    await reading
    assert books.given_back == [1]


@pytest.mark.parametrize("moment", ["arrival", "progress", "more", "over"])
async def test_cancelled_at_any_await_it_holds_nothing(moment: str) -> None:
    books = Books()
    if moment != "arrival":
        books.lender.admit("r", 0, 1)
    heard: list[object] = []

    async def read() -> None:
        async with contextlib.aclosing(books.lend()) as events:
            async for event in events:
                heard.append(event)

    reading = asyncio.create_task(read())
    await asyncio.sleep(0.005)
    if moment in ("more", "over"):
        books.ready(2, done=moment == "over")
        await until(lambda: heard)
        await asyncio.sleep(0.005)
    assert not reading.done()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert books.lender.num_open == 0
    assert books.given_back == ([] if moment == "arrival" else [1])
    assert not books.lender._arrivals


async def test_a_request_named_again_by_a_later_leg_is_not_forgotten_with_the_first() -> None:
    books = Books()
    books.lender.admit("r", 0, 1)
    books.lender.admit("r", 0, 2)
    books.lender.forget(1)
    events = books.lend()
    told = asyncio.create_task(anext(events))
    await until(lambda: books.asked == [2])
    told.cancel()
    await asyncio.gather(told, return_exceptions=True)
    with contextlib.suppress(TailraceError):
        await events.aclose()
    assert books.given_back == [2]

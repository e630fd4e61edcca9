"""The owner's side of `Lend` for requests being prefilled.

It waits for the request, then tells what is ready, in order, each block once.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from tailrace.errors import NotFoundError, UnauthenticatedError
from tailrace.messages import LendDone, LendTerms, LentBlocks
from tailrace.rpc.auth import is_ticket
from tailrace.worker.report import LendProgress

ARRIVAL_S = 10.0
"""The two legs of a request travel apart: the needer may ask before the owner has heard of it."""


@dataclass(slots=True, eq=False)
class LendFeed:
    """What one needer has been told. Progress may be repeated or skip ahead; what is told never repeats."""

    num_told: int
    _news: list[LendProgress] = field(default_factory=list)
    _event: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    """The request is gone."""

    def add(self, progress: LendProgress) -> None:
        self._news.append(progress)
        self._event.set()

    def end(self) -> None:
        self.over.set()
        self._event.set()

    async def events(self) -> AsyncGenerator[LentBlocks | LendDone, None]:
        """Raises NotFoundError when the request ends before all is ready."""
        while True:
            await self._event.wait()
            self._event.clear()
            news, self._news = self._news, []
            for progress in news:
                if (fresh := self._fresh(progress.ready)) is not None:
                    yield fresh
                if progress.done is not None:
                    yield progress.done
                    return
            if self.over.is_set():
                raise NotFoundError("the request ended before its blocks were lent")

    def _fresh(self, ready: LentBlocks) -> LentBlocks | None:
        self.num_told = max(self.num_told, ready.first_index)
        skip = self.num_told - ready.first_index
        if skip >= len(ready.blocks):
            return None
        first, self.num_told = self.num_told, ready.first_index + len(ready.blocks)
        return LentBlocks(first, ready.blocks[skip:], ready.addresses[skip:], ready.generations[skip:])


class Lender:
    """All open lends of a worker. Event loop only."""

    def __init__(
        self,
        *,
        secret: bytes,
        worker_id: str,
        epoch: int,
        ask_progress: Callable[[int], None],
        gave_back: Callable[[int], None],
    ) -> None:
        """`ask_progress` makes the engine report how far a request is; `gave_back`: its needer is done with it."""
        self._secret = secret
        self._worker_id = worker_id
        self._epoch = epoch
        self._ask_progress = ask_progress
        self._gave_back = gave_back
        self._requests: dict[tuple[str, int], int] = {}
        self._names: dict[int, tuple[str, int]] = {}
        self._arrivals: dict[tuple[str, int], list[asyncio.Event]] = {}
        self._feeds: dict[int, LendFeed] = {}

    @property
    def num_open(self) -> int:
        return len(self._feeds)

    def admit(self, request_id: str, attempt: int, leg_id: int) -> None:
        """From now on the request can be asked for."""
        name = (request_id, attempt)
        self._requests[name] = leg_id
        self._names[leg_id] = name
        for arrival in self._arrivals.get(name, ()):
            arrival.set()

    def forget(self, leg_id: int) -> None:
        """The leg is over. Idempotent."""
        if (name := self._names.pop(leg_id, None)) is not None and self._requests.get(name) == leg_id:
            del self._requests[name]
        if (feed := self._feeds.get(leg_id)) is not None:
            feed.end()

    def deliver(self, lends: list[LendProgress]) -> None:
        for progress in lends:
            if (feed := self._feeds.get(progress.request_id)) is not None:
                feed.add(progress)

    async def lend(self, terms: LendTerms) -> AsyncGenerator[LentBlocks | LendDone, None]:
        """Closing the iterator, at any point, gives the blocks back.

        Raises UnauthenticatedError for a ticket of another request or another life of this worker, NotFoundError when
        the request does not arrive or ends early.
        """
        if not is_ticket(terms.ticket, self._secret, terms.request_id, terms.attempt, self._worker_id, self._epoch):
            raise UnauthenticatedError("not a ticket for this request and this life of the worker", param="ticket")
        leg_id = await self._find((terms.request_id, terms.attempt))
        if leg_id in self._feeds:
            raise UnauthenticatedError("the ticket is in use", param="ticket")
        feed = self._feeds[leg_id] = LendFeed(terms.skip_blocks)
        try:
            self._ask_progress(leg_id)
            async with contextlib.aclosing(feed.events()) as events:
                async for event in events:
                    yield event
            # The needer reads on until it closes the stream; the request's deadline bounds it.
            await feed.over.wait()
        finally:
            del self._feeds[leg_id]
            self._gave_back(leg_id)

    async def _find(self, name: tuple[str, int]) -> int:
        if (leg_id := self._requests.get(name)) is not None:
            return leg_id
        arrival = asyncio.Event()
        waiting = self._arrivals.setdefault(name, [])
        waiting.append(arrival)
        try:
            async with asyncio.timeout(ARRIVAL_S):
                await arrival.wait()
        except TimeoutError:
            raise NotFoundError(f"request {name[0]} (attempt {name[1]}) did not arrive in {ARRIVAL_S:g} s") from None
        finally:
            waiting.remove(arrival)
            if not waiting:
                del self._arrivals[name]
        if name not in self._requests:
            raise NotFoundError(f"request {name[0]} (attempt {name[1]}) ended before its blocks were asked for")
        return self._requests[name]

"""Pauses between attempts to reach what is away: longer each time, and never two callers' at the same moment."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any

from tailrace.index.redis_client import RedisClient
from tailrace.index.trouble import RedisTroubleError

log = logging.getLogger(__name__)

FIRST_S = 0.2
LONGEST_S = 5.0


class Backoff:
    """Doubles from FIRST_S to LONGEST_S; each pause is a random part, half or more, of it."""

    def __init__(self) -> None:
        self._whole_s = FIRST_S

    def reset(self) -> None:
        """It went well."""
        self._whole_s = FIRST_S

    async def pause(self) -> None:
        await asyncio.sleep(self.next_s())

    def next_s(self) -> float:
        whole_s, self._whole_s = self._whole_s, min(LONGEST_S, self._whole_s * 2)
        return whole_s * random.uniform(0.5, 1.0)  # noqa: S311 - spreads callers, guards nothing


async def keep_trying(
    client: RedisClient,
    session: Callable[[Backoff], Awaitable[None]],
    note: Callable[[RedisTroubleError], None],
    doing: str,
) -> None:
    """`session` after `session`, each with the client closed before, until this is cancelled.

    `note` hears why one ended. `session` resets the pauses when all is well; `doing` names it in the log.
    """
    backoff = Backoff()
    while True:
        try:
            await session(backoff)
        except RedisTroubleError as error:
            note(error)
        except Exception:
            log.exception("%s failed; it is begun anew", doing)
        await client.close()
        await backoff.pause()


async def until_one_fails(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Raises what the first of them raises, when all have ended. (A TaskGroup forgets that it was cancelled itself.)"""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

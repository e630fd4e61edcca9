"""Waiting for what another thread does."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine

PATIENCE_S = 15.0
"""Others may use the machine as well."""


async def until(condition: Callable[[], object], seconds: float = PATIENCE_S) -> None:
    """Raises TimeoutError when `condition` does not come true."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # nobody sets an event for what a test looks at
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def in_background(*runs: Coroutine[object, object, object]) -> AsyncIterator[None]:
    """They go on until the block is left; none of them may end before."""
    tasks = [asyncio.create_task(run) for run in runs]
    try:
        yield
        for task in tasks:
            assert not task.done(), task.exception()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

"""Waiting for what another thread does."""

import asyncio
from collections.abc import Callable

PATIENCE_S = 15.0
"""Others may use the machine as well."""


async def until(condition: Callable[[], object], seconds: float = PATIENCE_S) -> None:
    """Raises TimeoutError when `condition` does not come true."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # nobody sets an event for what a test looks at
            await asyncio.sleep(0.002)

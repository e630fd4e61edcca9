"""uvicorn without its ten looks a second at whether it should stop."""

import asyncio
from types import FrameType

import uvicorn

_TICK_S = 1.0
"""Answers carry the time of day in seconds."""


class HttpServer(uvicorn.Server):
    """Made on the loop that serves. A signal ends its wait at once."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._loop = asyncio.get_running_loop()
        self._told = asyncio.Event()

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            try:
                async with asyncio.timeout(_TICK_S):
                    await self._told.wait()
            except TimeoutError:
                pass

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._loop.call_soon_threadsafe(self._told.set)

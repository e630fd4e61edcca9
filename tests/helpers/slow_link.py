"""A way to a server on loopback whose answers take a while."""

import asyncio
import contextlib
from collections.abc import AsyncIterator


class SlowLink:
    """`delay_s` may be changed at any time, and counts for each piece that the server sends from then on."""

    def __init__(self, to_port: int) -> None:
        self.delay_s = 0.0
        self._to_port = to_port
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        there, back = await asyncio.open_connection("127.0.0.1", self._to_port)
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._carry(reader, back, is_answer=False))
                both.create_task(self._carry(there, writer, is_answer=True))
        except* OSError:
            pass
        finally:
            self._tasks.discard(task)
            for end in (writer, back):
                end.close()

    async def _carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, is_answer: bool) -> None:
        while piece := await source.read(1 << 16):
            if is_answer and self.delay_s:
                await asyncio.sleep(self.delay_s)
            target.write(piece)
            await target.drain()
        target.close()

    @classmethod
    @contextlib.asynccontextmanager
    async def to(cls, port: int) -> AsyncIterator["SlowLink"]:
        link = cls(port)
        link._server = await asyncio.start_server(link._connected, "127.0.0.1", 0)
        try:
            yield link
        finally:
            link._server.close()
            for task in list(link._tasks):
                task.cancel()
            await asyncio.gather(*link._tasks, return_exceptions=True)

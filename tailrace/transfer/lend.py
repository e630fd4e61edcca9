"""The owner's side: what of this process's blocks others can read, and how."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from tailrace.errors import TransferError
from tailrace.transfer.endpoints import PeerEndpoints
from tailrace.transfer.memory import PoolMemory
from tailrace.transfer.nixl_driver import NixlDriver
from tailrace.transfer.options import TransferOptions
from tailrace.transfer.stream_server import StreamServer


class Owner:
    """Offers one pool for reading over every transport that the options and this machine allow.

    `nixl` only lends: the needer of this process has an agent of its own. It is started and closed outside
    (see `TransferPlane`).
    """

    def __init__(self, memory: PoolMemory, options: TransferOptions, nixl: NixlDriver | None = None) -> None:
        self._memory = memory
        self._options = options
        self._nixl = nixl
        self._stream: StreamServer | None = None

    async def start(self) -> None:
        """Raises TransferError when nothing can be offered, ConfigError for a port that cannot be had."""
        if self._memory.view is not None:
            self._stream = StreamServer(self._memory, self._options)
            self._stream.start()
        elif self._nixl is None:
            raise TransferError("this pool can be read over nixl only, and nixl is not available")

    def endpoints(self) -> PeerEndpoints:
        return PeerEndpoints(
            worker_id=self._options.worker_id,
            epoch=self._options.epoch,
            block_bytes=self._memory.block_bytes,
            num_blocks=self._memory.num_blocks,
            nixl=self._nixl.endpoint() if self._nixl else None,
            stream=self._stream.endpoint() if self._stream else None,
        )

    @property
    def pool_address(self) -> int:
        """Of the first byte of block 0."""
        return self._memory.address

    def note_meeting(self) -> None:
        """A needer has just met us: make progress for a while, so that its first contact can complete."""
        if self._nixl:
            self._nixl.make_progress_for(self._options.meeting_window_s)

    @contextmanager
    def lending(self, transport: str) -> Iterator[None]:
        """Open while something is lent over `transport`; makes the progress that it needs from the owner."""
        if transport != "nixl" or self._nixl is None:
            yield
            return
        with self._nixl.progress():
            yield

    async def close(self) -> None:
        """Nobody reads over the stream any more afterwards. Idempotent."""
        stream, self._stream = self._stream, None
        if stream:
            await asyncio.to_thread(stream.close)

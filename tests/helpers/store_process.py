"""A real store process, and an owner and a needer in the test's own that talk to it."""

import asyncio
import contextlib
import re
import signal
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar
from urllib.request import urlopen

from tailrace.config import base_environment
from tailrace.host_memory import map_memory
from tailrace.kv.block_pool import BlockPool
from tailrace.kv.layout import KVLayout
from tailrace.messages import BlockOffer, KvSource, LendDone, LendTerms, LentBlocks
from tailrace.rpc.client import Peer
from tailrace.rpc.gen import kv_pb2_grpc
from tailrace.rpc.server import KvOwnerServicer, Server
from tailrace.transfer import BlockRead, PeerEndpoints, PoolMemory, TransferOptions, TransferPlane, open_transfer
from tailrace.transfer.memory import address_of
from tailrace.worker.cached_lending import CachedLender
from tailrace.worker.peers import OwnerPeers
from tests.helpers.stores import PAGED, bytes_of
from tests.helpers.values import SECRET, make_layout

LAYOUT = make_layout(**PAGED)
WRITTEN = 'tailrace_store_blocks_total{what="written"}'
T = TypeVar("T")


class StoreProcess:
    """`tailrace kvstore`, started and ready."""

    def __init__(self, process: asyncio.subprocess.Process, log: list[str]) -> None:
        self.process = process
        self.log = log
        self.address = ""
        self.metrics_url = ""

    async def wait_ready(self) -> None:
        assert self.process.stderr is not None
        while not self.address:
            line = (await asyncio.wait_for(self.process.stderr.readline(), 30)).decode()
            assert line, f"the store ended with {await self.process.wait()}: {''.join(self.log)}"
            self.log.append(line)
            if found := re.search(r"metrics on (\S+)", line):
                self.metrics_url = found[1]
            if found := re.search(r"ready on (\S+)", line):
                self.address = found[1]
        self._reader = asyncio.create_task(self._read_on())

    async def _read_on(self) -> None:
        assert self.process.stderr is not None
        while line := await self.process.stderr.readline():
            self.log.append(line.decode())

    async def metric(self, name: str) -> float:
        """One sample, by its name with labels."""
        text = await asyncio.to_thread(lambda: urlopen(self.metrics_url).read().decode())
        return next(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name + " "))

    async def end(self, number: int = signal.SIGTERM) -> int:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        status = await asyncio.wait_for(self.process.wait(), 20)
        with contextlib.suppress(AttributeError):
            await self._reader
        return status


def start_options(path: Path | None = None, **settings: object) -> dict[str, str]:
    values: dict[str, object] = {
        "secret": SECRET.decode(),
        "cpu_memory": "1MiB",
        "disk_bytes": "4MiB",
        "metrics_port": 0,
        "worker_id": "store",
        **({"disk_path": path} if path else {}),
        **settings,
    }
    return {f"TAILRACE_{name.upper()}": str(value) for name, value in values.items()}


@asynccontextmanager
async def store_process(path: Path | None = None, **settings: object) -> AsyncIterator[StoreProcess]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.kvstore.main"),
        env={**base_environment(), **start_options(path, **settings)},
        stderr=asyncio.subprocess.PIPE,
    )
    started = StoreProcess(process, [])
    try:
        await started.wait_ready()
        yield started
    finally:
        await started.end(signal.SIGKILL)


async def refused_start(path: Path, **settings: object) -> tuple[int, str]:
    """Exit status and stderr of a store that does not start."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.kvstore.main"),
        env={**base_environment(), **start_options(path, **settings)},
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await asyncio.wait_for(process.communicate(), 30)
    return process.returncode or 0, said.decode()


class _ThisThread:
    """The thread that a pool lives on, where there is no engine."""

    def post(self, function: Callable[..., object], *args: object) -> None:
        function(*args)

    async def call(self, function: Callable[..., T], *args: object) -> T:
        return function(*args)


class Worker:
    """A pool that can be offered, lent and pulled into, without an engine."""

    def __init__(self, worker_id: str, layout: KVLayout, num_blocks: int, transport: str) -> None:
        self.layout = layout
        self.pool = BlockPool(num_blocks, epoch=7)
        self.slab = memoryview(map_memory(num_blocks * layout.block_bytes))
        self.memory = PoolMemory(address_of(self.slab), layout.block_bytes, num_blocks, self.slab, self.pool.stamps)
        self.options = TransferOptions(worker_id, 7, "prefill", SECRET, preference=transport)  # type: ignore[arg-type]
        self.plane: TransferPlane
        self.peers: OwnerPeers
        self.address = ""
        self.lender = CachedLender(
            self.pool,
            _ThisThread(),
            block_bytes=layout.block_bytes,
            block_tokens=layout.block_size,
            pool_address=self.memory.address,
        )

    def meet(self, needer_id: str, needer_epoch: int) -> PeerEndpoints:
        self.plane.owner.note_meeting()
        return self.plane.owner.endpoints()

    async def lend(self, terms: LendTerms) -> AsyncGenerator[LentBlocks | LendDone, None]:
        with self.plane.owner.lending(terms.transport):
            async with contextlib.aclosing(self.lender.lend(terms)) as events:
                async for event in events:
                    yield event

    def cache(self, chain: Sequence[bytes]) -> None:
        """As after a prefill: the blocks are written, registered and held by nobody."""
        blocks = self.pool.allocate(len(chain))
        assert blocks is not None
        for block, name in zip(blocks, chain, strict=True):
            self.memory.bytes_of(block)[:] = bytes_of(name, self.layout.block_bytes)
            self.pool.register(block, name)
        self.pool.release(blocks)

    async def offer(self, store: StoreProcess, chain: Sequence[bytes], tenant: str = "") -> tuple[bytes, ...]:
        peer = Peer(store.address, SECRET)
        try:
            source = KvSource(self.options.worker_id, 7, self.address, b"")
            return await peer.offer(BlockOffer(source, self.layout, tuple(chain), tenant))
        finally:
            await peer.close()

    async def pull(self, store: StoreProcess, chain: Sequence[bytes]) -> int:
        """Blocks that the store lent of the chain; asserts that all of them have the right bytes."""
        endpoint = KvSource("store", await self._epoch_of(store), store.address, b"")
        link = await self.peers.link(endpoint)
        terms = LendTerms("", 0, b"", self.options.worker_id, 7, link.transport, block_hashes=tuple(chain))
        num_good = 0
        async with self.peers.lend(endpoint, terms) as events:
            async for event in events:
                if isinstance(event, LendDone):
                    assert event.cached_tokens == num_good * self.layout.block_size
                    return num_good
                assert event.first_index == num_good
                targets = self.pool.allocate_landing(len(event.blocks))
                assert targets is not None
                lent = zip(event.blocks, event.addresses, event.generations, targets, strict=True)
                result = await link.read([BlockRead(*each) for each in lent]).wait(10.0)
                assert result is not None
                assert result.outcome == "good", result.message
                for index, target in enumerate(targets, start=event.first_index):
                    assert self.memory.bytes_of(target) == bytes_of(chain[index], self.layout.block_bytes)
                self.pool.abandon_landing(targets)
                num_good += len(targets)
        raise AssertionError("the store closed the stream")

    async def _epoch_of(self, store: StoreProcess) -> int:
        peer = Peer(store.address, SECRET)
        try:
            return (await peer.ledger()).epoch
        finally:
            await peer.close()


@asynccontextmanager
async def worker(
    worker_id: str = "w", *, layout: KVLayout = LAYOUT, num_blocks: int = 120, transport: str = "auto"
) -> AsyncIterator[Worker]:
    rig = Worker(worker_id, layout, num_blocks, transport)
    rig.plane = await open_transfer(rig.memory, rig.options)
    rig.peers = OwnerPeers(rig.plane.needer, layout, worker_id=worker_id, epoch=7, secret=SECRET)
    server = Server(SECRET)
    rig.address = f"127.0.0.1:{server.bind('127.0.0.1', 0)}"
    kv_pb2_grpc.add_KvOwnerServiceServicer_to_server(KvOwnerServicer(rig), server.grpc)
    await server.start()
    try:
        yield rig
    finally:
        await rig.peers.close()
        await server.stop()
        await rig.plane.close()


async def until(store: StoreProcess, name: str, value: float) -> None:
    """A metric has reached this value."""
    async with asyncio.timeout(30):
        while await store.metric(name) < value:  # noqa: ASYNC110  # another process sets no event
            await asyncio.sleep(0.02)


async def one_life(slab: Path, peer: Worker, chain: Sequence[bytes], end: int = signal.SIGTERM) -> int:
    """Of a store that takes a chain and writes it to its disk; the status it ends with."""
    async with store_process(slab) as store:
        await peer.offer(store, chain)
        await until(store, WRITTEN, len(chain))
        return await store.end(end)

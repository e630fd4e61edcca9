"""A worker that has a pool and nothing else: a real process that a transfer test talks to in JSON lines.

`python -m tests.helpers.transfer_worker CONFIG` answers commands on stdin until it is closed or killed.
"""

import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tailrace.errors import TailraceError
from tailrace.transfer import (
    BlockRead,
    Link,
    Needer,
    Owner,
    PeerEndpoints,
    PendingRead,
    PoolMemory,
    TransferOptions,
    TransferPlane,
    open_transfer,
)
from tailrace.transfer.nixl import start_nixl
from tests.helpers.transfer_pools import blocks_of, make_options, make_pool, peer_from_json, peer_to_json


class Commands:
    def __init__(self, plane: TransferPlane, pool: Any) -> None:
        self.plane = plane
        self.pool = pool
        self.loans = contextlib.ExitStack()
        self.links: dict[str, Link] = {}
        self.pending: dict[str, PendingRead] = {}

    async def meet(self) -> Any:
        self.plane.owner.note_meeting()
        return peer_to_json(self.plane.owner.endpoints())

    async def lend(self, transport: str) -> None:
        self.loans.enter_context(self.plane.owner.lending(transport))

    async def unlend(self) -> None:
        self.loans.close()

    async def bump(self, blocks: list[int]) -> None:
        self.pool.stamps[blocks] += 1

    async def connect(self, peer: dict[str, Any]) -> str:
        link = await self.plane.needer.connect(peer_from_json(peer))
        self.links[peer["worker_id"]] = link
        return link.transport

    async def read(self, name: str, owner: str, reads: list[list[int]]) -> None:
        self.pending[name] = self.links[owner].read([BlockRead(*read) for read in reads])

    async def read_again_and_again(self, owner: str, reads: list[list[int]]) -> None:
        """Keeps the link busy until this process is killed."""
        self.task = asyncio.create_task(self._pull_forever(self.links[owner], [BlockRead(*read) for read in reads]))

    async def _pull_forever(self, link: Link, reads: list[BlockRead]) -> None:
        while True:
            await link.read(reads).wait()

    async def abort(self, owner: str) -> None:
        self.links[owner].abort()

    async def wait(self, name: str, timeout_s: float) -> Any:
        result = await self.pending[name].wait(timeout_s)
        return None if result is None else [result.outcome, result.message]

    async def fill(self, blocks: list[int], value: int) -> None:
        blocks_of(self.pool)[blocks] = value

    async def values(self, block: int) -> list[int]:
        """The different bytes that a block holds."""
        return sorted(set(blocks_of(self.pool)[block].tolist()))

    async def stall(self, seconds: float) -> None:
        """The event loop stands still, and this thread wants the interpreter for itself."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pass

    async def cpu_s(self) -> float:
        return time.process_time()

    async def close(self) -> bool:
        return await self.plane.close()


async def _open_with_one_agent(pool: PoolMemory, options: TransferOptions) -> TransferPlane:
    """What no worker does: one agent lends and reads. Two that read each other so have links that are emulated."""
    driver = await asyncio.to_thread(start_nixl, pool, options, "lends")
    owner = Owner(pool, options, driver)
    await owner.start()
    return TransferPlane(owner, Needer(pool, options, driver), [driver])


async def serve(config: dict[str, Any]) -> None:
    pool = make_pool(**config["pool"])
    options = make_options(**config["options"])
    plane = await (_open_with_one_agent if config["one_agent"] else open_transfer)(pool, options)
    commands = Commands(plane, pool)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    print("ready", flush=True)
    while line := await reader.readline():
        command = json.loads(line)
        try:
            answer = {"answer": await getattr(commands, command.pop("do"))(**command)}
        except TailraceError as error:
            answer = {"error": f"{type(error).__name__}: {error.message}"}
        print(json.dumps(answer), flush=True)
    await commands.close()


class WorkerProcess:
    """The test's end."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def call(self, do: str, **arguments: Any) -> Any:
        """The command's answer. Raises RuntimeError with its error."""
        self.process.stdin.write(json.dumps({"do": do} | arguments).encode() + b"\n")
        line = await asyncio.wait_for(self.process.stdout.readline(), 30)
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["answer"]

    async def meet(self) -> PeerEndpoints:
        return peer_from_json(await self.call("meet"))

    async def pull(self, owner: PeerEndpoints, reads: list[BlockRead], timeout_s: float = 10) -> Any:
        """[outcome, message], or None while unsettled."""
        await self.call("connect", peer=peer_to_json(owner))
        await self.start_read("pull", owner, reads)
        return await self.call("wait", name="pull", timeout_s=timeout_s)

    async def start_read(self, name: str, owner: PeerEndpoints, reads: list[BlockRead]) -> None:
        await self.call("read", name=name, owner=owner.worker_id, reads=as_lists(reads))

    def stop(self) -> None:
        """Returns when every thread of it stands still: the signal alone only asks for that."""
        self.process.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self.process.pid}/task")
        while any(_state(task) not in "TX" for task in tasks.iterdir()):
            pass

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()


def as_lists(reads: list[BlockRead]) -> list[list[int]]:
    return [[r.source_block, r.source_address, r.generation, r.target_block] for r in reads]


@asynccontextmanager
async def worker(
    worker_id: str,
    *,
    seed: int = 0,
    epoch: int = 1,
    num_blocks: int = 32,
    block_bytes: int = 4096,
    one_agent: bool = False,
    **options: Any,
) -> AsyncIterator[WorkerProcess]:
    """A started worker process; killed at the end."""
    config = {
        "one_agent": one_agent,
        "pool": {"num_blocks": num_blocks, "block_bytes": block_bytes, "seed": seed, "epoch": epoch},
        "options": {"worker_id": worker_id, "epoch": epoch} | options,
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.helpers.transfer_worker", json.dumps(config)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    started = WorkerProcess(process)
    try:
        assert await asyncio.wait_for(process.stdout.readline(), 30) == b"ready\n"
        yield started
    finally:
        await started.kill()


if __name__ == "__main__":
    asyncio.run(serve(json.loads(sys.argv[1])))


def _state(task: Path) -> str:
    """One letter of proc(5); a thread that ends meanwhile is dead."""
    try:
        return (task / "stat").read_text(encoding="utf-8").rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"

"""`local`: owner and needer in one process, a plain copy. For tests of what sits above the transports."""

import asyncio
import time
from collections.abc import Mapping, Sequence

from tailrace.errors import TransferError
from tailrace.transfer.endpoints import PeerEndpoints
from tailrace.transfer.memory import PoolMemory
from tailrace.transfer.reads import BlockRead, PendingRead, RateMeter, ReadResult, judge, plan_read


class LocalLink:
    """Copies at once; the result arrives with the event loop's next turn."""

    transport = "local"
    broken = False

    def __init__(self, owner: PoolMemory, needer: PoolMemory) -> None:
        self._owner = owner
        self._needer = needer
        self.rate = RateMeter()

    def read(self, reads: Sequence[BlockRead]) -> PendingRead:
        plan = plan_read(reads, self._needer)
        started = time.monotonic()
        for run in plan.runs:
            source = self._owner.bytes_of(run.source_block, run.num_blocks)
            self._needer.bytes_of(run.target_block, run.num_blocks)[:] = source
        elapsed_s = time.monotonic() - started
        self.rate.add(plan.num_bytes, elapsed_s)
        outcome, message = judge(plan, self._owner.stamps[[read.source_block for read in plan.reads]])
        pending = PendingRead(asyncio.get_running_loop())
        pending.settle(ReadResult(outcome, elapsed_s, plan.num_bytes, message))
        return pending

    def abort(self) -> None:
        self.broken = True

    def join(self) -> None:
        """There is no thread."""


class LocalNeeder:
    """A Needer whose owners are pools of this process, by worker id."""

    def __init__(self, memory: PoolMemory, owners: Mapping[str, PoolMemory]) -> None:
        self._memory = memory
        self._owners = owners

    async def connect(self, peer: PeerEndpoints) -> LocalLink:
        owner = self._owners.get(peer.worker_id)
        if owner is None:
            raise TransferError(f"{peer.worker_id} is not in this process")
        return LocalLink(owner, self._memory)

    def forget(self, worker_id: str, epoch: int) -> None:
        """Nothing is kept."""

    async def close(self) -> None:
        """Nothing is kept."""

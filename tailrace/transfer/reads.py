"""A read of lent blocks: what is asked, what came of it, and when nothing can land any more."""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tailrace.transfer.memory import PoolMemory

_log = logging.getLogger(__name__)

MAX_SAMPLES = 8
"""Of a link's rate, the last ones."""
SAMPLE_S = 0.5


@dataclass(frozen=True, slots=True)
class BlockRead:
    """Copy one lent block into one of ours. `generation` is the stamp that it was lent with."""

    source_block: int
    source_address: int
    generation: int
    target_block: int


class ReadOutcome(StrEnum):
    GOOD = "good"
    STALE = "stale"
    """Everything landed, but a block was no longer what was lent: nothing of this read may be used."""
    FAILED = "failed"
    """Part of it may have landed; nothing may be used."""


@dataclass(frozen=True, slots=True)
class ReadResult:
    outcome: ReadOutcome
    elapsed_s: float
    num_bytes: int
    """Bytes asked for."""
    message: str = ""


class Settlement(asyncio.Future[ReadResult]):
    """A future that only its operation ends: a cancel is refused, for a cancelled read would still land."""

    def cancel(self, msg: object = None) -> bool:
        return False


class PendingRead:
    """`settled` resolves once the operation is over, so that nothing can land any more, and never before.

    Wait for it with `wait` or `asyncio.wait`, which can be cancelled and leave it alone; awaited bare, or by
    `asyncio.wait_for`, it holds its caller until it is over.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.settled: asyncio.Future[ReadResult] = Settlement(loop=loop)

    async def wait(self, timeout_s: float | None = None) -> ReadResult | None:
        """The result, or None when `timeout_s` passed before the operation was over."""
        await asyncio.wait({self.settled}, timeout=timeout_s)
        return self.settled.result() if self.settled.done() else None

    def settle(self, result: ReadResult) -> None:
        """Called once, by whoever drives the operation, from any thread."""
        try:
            self._loop.call_soon_threadsafe(self.settled.set_result, result)
        except RuntimeError:
            _log.debug("a read settled after its event loop was closed: %s", result)


class Link(Protocol):
    """One needer's way to one owner."""

    transport: str
    rate: "RateMeter"
    """Of its good reads, each from when its turn has come: reads of one link may wait for one another."""

    @property
    def broken(self) -> bool:
        """No read can succeed any more."""

    def read(self, reads: Sequence[BlockRead]) -> PendingRead:
        """Start one transfer of many blocks. Raises ValueError for targets that are not ours, or not all different.

        Everything that goes wrong on the way, and a broken link, is a FAILED result.
        """

    def abort(self) -> None:
        """Give the peer up. Reads in flight settle when their transport says that nothing can land any more:
        at once over `stream`; over `nixl` only when the operation itself ends."""

    def join(self) -> None:
        """Blocks until a thread of an aborted link's own, if it has one, has ended."""


@dataclass(frozen=True, slots=True)
class BlockRun:
    """`num_blocks` blocks, contiguous at the owner and at the needer: one descriptor."""

    source_block: int
    source_address: int
    target_block: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """Reads in the order in which they travel, and their runs."""

    reads: tuple[BlockRead, ...]
    runs: tuple[BlockRun, ...]
    block_bytes: int

    @property
    def num_bytes(self) -> int:
        return len(self.reads) * self.block_bytes


def plan_read(reads: Sequence[BlockRead], memory: PoolMemory) -> ReadPlan:
    """Order the reads by source and merge what is contiguous on both sides.

    Raises ValueError when there is nothing to read, a target is not a block of `memory`, or two reads share a target.
    """
    ordered = tuple(sorted(reads, key=lambda read: (read.source_block, read.target_block)))
    targets = {read.target_block for read in ordered}
    if not ordered or len(targets) != len(ordered):
        raise ValueError("a read needs one or more blocks, each with its own target")
    if min(targets) < 0 or max(targets) >= memory.num_blocks:
        raise ValueError(f"target blocks {min(targets)}..{max(targets)} are not all in a pool of {memory.num_blocks}")
    return ReadPlan(ordered, tuple(_merge(ordered, memory.block_bytes)), memory.block_bytes)


def _merge(ordered: Sequence[BlockRead], block_bytes: int) -> list[BlockRun]:
    runs: list[BlockRun] = []
    for read in ordered:
        last = runs[-1] if runs else None
        if last is not None and _continues(last, read, block_bytes):
            runs[-1] = BlockRun(last.source_block, last.source_address, last.target_block, last.num_blocks + 1)
        else:
            runs.append(BlockRun(read.source_block, read.source_address, read.target_block, 1))
    return runs


def _continues(run: BlockRun, read: BlockRead, block_bytes: int) -> bool:
    return (
        read.source_block == run.source_block + run.num_blocks
        and read.target_block == run.target_block + run.num_blocks
        and read.source_address == run.source_address + run.num_blocks * block_bytes
    )


def judge(plan: ReadPlan, stamps: npt.NDArray[np.uint64]) -> tuple[ReadOutcome, str]:
    """GOOD when `stamps`, read after the data and in the plan's order, are the ones that the blocks were lent with."""
    stale = [
        read.source_block for read, stamp in zip(plan.reads, stamps.tolist(), strict=True) if stamp != read.generation
    ]
    if not stale:
        return ReadOutcome.GOOD, ""
    return (
        ReadOutcome.STALE,
        f"{len(stale)} of {len(plan.reads)} blocks are not what was lent; the first is block {stale[0]}",
    )


@dataclass(slots=True)
class _Sample:
    first_over_s: float
    num_bytes: int
    seconds: float

    @property
    def bytes_per_s(self) -> float:
        return self.num_bytes / self.seconds


class RateMeter:
    """How fast one link is, by its last reads: the rate that half of their bytes came at, or faster.

    One slow transfer changes it only if it is as large as all others together. Reads that end within SAMPLE_S of a
    sample's first are one sample, so that the chunks of one prompt do not outvote those before. Only time in which
    bytes move is to be counted.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._samples: deque[_Sample] = deque(maxlen=MAX_SAMPLES)
        self.used_s = clock()
        """When it was last added to."""

    def add(self, num_bytes: int, seconds: float) -> None:
        """One read. An impossible one is ignored."""
        if num_bytes < 1 or not 0.0 < seconds < math.inf:
            return
        with self._lock:
            self.used_s = self._clock()
            last = self._samples[-1] if self._samples else None
            if last is not None and self.used_s - last.first_over_s < SAMPLE_S:
                last.num_bytes += num_bytes
                last.seconds += seconds
            else:
                self._samples.append(_Sample(self.used_s, num_bytes, seconds))

    @property
    def num_samples(self) -> int:
        return len(self._samples)

    @property
    def bytes_per_s(self) -> float:
        """0 before the first read."""
        with self._lock:
            ranked = sorted(((each.bytes_per_s, each.num_bytes) for each in self._samples), reverse=True)
        left = sum(num_bytes for _, num_bytes in ranked) / 2
        for rate, num_bytes in ranked:
            left -= num_bytes
            if left <= 0:
                return rate
        return 0.0

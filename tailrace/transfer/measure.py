"""How fast a pair is, beside what one core's memcpy does in blocks of the same size."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tailrace.errors import TransferError
from tailrace.transfer.reads import BlockRead, Link, ReadOutcome, ReadResult


@dataclass(frozen=True, slots=True)
class PullRate:
    transport: str
    bytes_per_s: float
    """Of the fastest of the repeats, from asking to settled, stamps included."""
    num_bytes: int
    """Of one repeat."""


def memcpy_bytes_per_s(block_bytes: int = 368_640, num_blocks: int = 64, repeats: int = 5) -> float:
    """One thread copies blocks between two buffers that are touched before; the fastest repeat counts."""
    source = np.ones((num_blocks, block_bytes), dtype=np.uint8)
    target = np.zeros_like(source)
    best_s = min(_copy_s(source, target) for _ in range(repeats + 1))
    return source.nbytes / best_s


def _copy_s(source: npt.NDArray[np.uint8], target: npt.NDArray[np.uint8]) -> float:
    started = time.perf_counter()
    for block in range(len(source)):
        target[block] = source[-1 - block]
    return time.perf_counter() - started


async def pull_bytes_per_s(
    link: Link, reads: Sequence[BlockRead], repeats: int = 5, timeout_s: float = 30.0
) -> PullRate:
    """Read the same lent blocks `repeats` times, after once to warm up. Raises TransferError unless all are good."""
    results = [await _pull(link, reads, timeout_s) for _ in range(repeats + 1)][1:]
    best = min(results, key=lambda result: result.elapsed_s)
    return PullRate(link.transport, best.num_bytes / best.elapsed_s, best.num_bytes)


async def _pull(link: Link, reads: Sequence[BlockRead], timeout_s: float) -> ReadResult:
    result = await link.read(reads).wait(timeout_s)
    if result is None:
        raise TransferError(f"a read over {link.transport} did not settle within {timeout_s:g} s")
    if result.outcome is not ReadOutcome.GOOD:
        raise TransferError(f"a read over {link.transport} was {result.outcome}: {result.message}")
    return result

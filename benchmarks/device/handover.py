"""Two processes on one GPU: one prefills, the other maps its pool by CUDA IPC, copies the blocks and decodes.

This is the floor of a handover on one device: one copy of adjacent blocks, no connection, no stamps. The product's own
transfers do not go this way yet: `nixl` refuses GPU memory unless the two ends share an RDMA device.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import multiprocessing

from benchmarks.device.models import decode_started, dummy_engine, prefill, start
from benchmarks.device.peaks import BLOCK, Peaks, Shape
from tailrace.engine.engine import Engine
from tailrace.plan import StepPlan

_ANSWER_S = 300.0
"""The longest wait for the other process: loading its model is the longest of what it does."""


@dataclass(frozen=True, slots=True)
class Handover:
    """One of them, from the end of the prefill on."""

    num_bytes: int
    copy_s: float
    exposed_s: float
    """From the end of the prefill in one process to the moment at which the other may decode."""
    tokens: list[int]
    is_exact: bool
    """The blocks are those of a prefill in this process, to the bit. Random weights draw nearly the same tokens
    whatever the keys and values are, so equal tokens alone would prove little."""


@dataclass(frozen=True, slots=True)
class Sizes:
    prompt: int
    steps: int

    @property
    def longest(self) -> int:
        return self.prompt + self.steps + 1

    @property
    def blocks(self) -> int:
        """That hold the keys and values of the prompt."""
        return -(-self.prompt // BLOCK)


class Prefiller:
    """The other process, as this one sees it: its pool, mapped here, and whom to ask for a prefill."""

    def __init__(self, connection: Connection, pools: "multiprocessing.Queue[torch.Tensor]") -> None:
        self._connection = connection
        self.pool = pools.get(timeout=_ANSWER_S)

    def prefill(self) -> tuple[int, float]:
        """The first token, and when it was there, on the clock that processes share."""
        self._connection.send_bytes(b"prefill")
        if not self._connection.poll(_ANSWER_S):
            raise TimeoutError(f"the prefilling process said nothing for {_ANSWER_S:g} s")
        token, at = self._connection.recv_bytes().decode().split()
        return int(token), float(at)


@contextmanager
def prefiller(shape: Shape, device: str, sizes: Sizes) -> Iterator[Prefiller]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    pools = context.Queue()
    process = context.Process(target=_serve, args=(shape, device, sizes, theirs, pools), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Prefiller(ours, pools)
    finally:
        ours.close()
        process.join(10)
        process.kill()


def _serve(shape: Shape, device: str, sizes: Sizes, connection: Connection, pools: Any) -> None:
    """The prefilling process: lends its pool, then prefills once for each message until the connection is closed."""
    with torch.inference_mode():
        engine = dummy_engine(shape, device, batch=1, longest=sizes.longest)
        pools.put(engine.cache.tensor)
        try:
            while connection.recv_bytes():
                step = prefill(engine, sizes.prompt)
                connection.send_bytes(f"{step.tokens[0]} {time.monotonic()}".encode())
        except EOFError:
            return


def take(engine: Engine, other: Prefiller, sizes: Sizes, expected: torch.Tensor) -> Handover:
    """Has the other prefill, copies the blocks and decodes. `expected`: those blocks, as this process computes them."""
    target = engine.cache.tensor[: sizes.blocks]
    target.zero_()  # what an earlier round left must not pass for what was copied
    first, over_at = other.prefill()
    began = time.monotonic()
    target.copy_(other.pool[: sizes.blocks])
    if target.is_cuda:
        torch.cuda.synchronize()
    ended = time.monotonic()
    is_exact = torch.equal(target, expected)
    started = start(0, sizes.prompt, sizes.longest, drawn=(first,))
    engine.runner.run(StepPlan(released=[0], started=[started]))
    tokens = [first, *decode_started(engine, [0], sizes.steps)]
    return Handover(target.nbytes, ended - began, ended - over_at, tokens, is_exact)


def compare_handover(
    shape: Shape, device: str, peaks: Peaks, *, prompt: int = 8192, steps: int = 32, rounds: int = 5
) -> bool:
    """Prints the rate and the exposed time. True when each round's blocks and tokens are those of one process alone."""
    sizes = Sizes(prompt, steps)
    engine = dummy_engine(shape, device, batch=1, longest=sizes.longest)
    with prefiller(shape, device, sizes) as other:
        alone = [*prefill(engine, prompt, longest=sizes.longest).tokens]
        expected = engine.cache.tensor[: sizes.blocks].clone()
        alone += decode_started(engine, [0], steps)
        taken = [take(engine, other, sizes, expected) for _ in range(1 + rounds)]
    agree = all(handover.tokens == alone and handover.is_exact for handover in taken)
    rates = [handover.num_bytes / handover.copy_s for handover in taken[1:]]  # the first one maps memory
    exposed = [handover.exposed_s * 1e6 for handover in taken[1:]]
    rate, size = statistics.median(rates), taken[0].num_bytes
    print(
        f"{f'{shape.name} handover {prompt} by CUDA IPC':<52} {size / 1e6:.0f} MB at {rate / 1e9:.0f} GB/s "
        f"({min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f}), {2 * rate / peaks.bytes_per_s:.0%} of a local copy; "
        f"exposed {statistics.median(exposed):.0f} us ({min(exposed):.0f} to {max(exposed):.0f})"
    )
    print(f"{'ok' if agree else 'DIFFERS':<8} {shape.name} blocks and tokens after a handover and of one process alone")
    return agree

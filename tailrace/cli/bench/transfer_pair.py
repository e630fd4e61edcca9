"""The two processes of `tailrace bench transfer`: an owner that lends, and a needer that moves the same runs of blocks
in four ways and says how long each took.

Run as `python -m tailrace.cli.bench.transfer_pair owner` and `... needer`, as pair_rate's are.
"""

import asyncio
import ctypes
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

from tailrace.cli.pair_rate import EPOCH, decode_peer, encode_peer, make_options, make_pool, take_part
from tailrace.cli.processes import answer
from tailrace.errors import TransferError
from tailrace.transfer import BlockRead, Link, PeerEndpoints, PoolMemory, ReadOutcome, open_transfer
from tailrace.transfer.reads import BlockRun, plan_read

SHAPES = ("blocks", "range")
"""No two blocks adjacent at both ends, so that each travels by itself; or all of them adjacent: one run of bytes."""
_TIMEOUT_S = 60.0
_RUN = struct.Struct("<II")


class Way(Protocol):
    """One way to get blocks of the owner, or their like, into our pool."""

    async def move(self, reads: Sequence[BlockRead], runs: Sequence[BlockRun]) -> float:
        """Seconds from asking to the last byte, and for a pull to what vouches for it."""
        ...


@dataclass(frozen=True, slots=True)
class Pull:
    """The product's own."""

    link: Link

    async def move(self, reads: Sequence[BlockRead], runs: Sequence[BlockRun]) -> float:
        began = time.perf_counter()
        result = await self.link.read(reads).wait(_TIMEOUT_S)
        seconds = time.perf_counter() - began
        if result is None or result.outcome is not ReadOutcome.GOOD:
            raise TransferError(f"a read over {self.link.transport}: {result.message if result else 'no end'}")
        return seconds


@dataclass(frozen=True, slots=True)
class Memcpy:
    """memmove(3) by one thread, from memory of this process."""

    source: PoolMemory
    target: PoolMemory

    async def move(self, reads: Sequence[BlockRead], runs: Sequence[BlockRun]) -> float:
        size = self.target.block_bytes
        began = time.perf_counter()
        for run in runs:
            ctypes.memmove(
                self.target.address + run.target_block * size,
                self.source.address + run.source_block * size,
                run.num_blocks * size,
            )
        return time.perf_counter() - began


@dataclass(frozen=True, slots=True)
class BareSocket:
    """What TCP over loopback can do from Python: sendmsg there, recv_into here, no check of anything."""

    sock: socket.socket
    target: PoolMemory

    async def move(self, reads: Sequence[BlockRead], runs: Sequence[BlockRun]) -> float:
        began = time.perf_counter()
        self.sock.sendall(_RUN.pack(len(runs), 0) + b"".join(_RUN.pack(r.source_block, r.num_blocks) for r in runs))
        for run in runs:
            view = self.target.bytes_of(run.target_block, run.num_blocks)
            while view:
                view = view[self.sock.recv_into(view) :]
        return time.perf_counter() - began


def serve_bare(listener: socket.socket, pool: PoolMemory) -> None:
    """One needer, until it hangs up."""
    sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with sock, sock.makefile("rb") as orders:
        while head := orders.read(_RUN.size):
            num_runs, _ = _RUN.unpack(head)
            for first, count in list(_RUN.iter_unpack(orders.read(num_runs * _RUN.size))):
                view = pool.bytes_of(first, count)
                while view:
                    view = view[sock.sendmsg([view]) :]


async def own(order: dict[str, Any], answers: TextIO) -> None:
    """Lend the whole pool until stdin ends."""
    pool = make_pool(order["num_blocks"] * order["num_ranges"], order["block_bytes"])
    plane = await open_transfer(pool, make_options("owner", order, "auto"))
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener, plane.owner.lending("nixl"):
            threading.Thread(target=serve_bare, args=(listener, pool), daemon=True).start()
            plane.owner.note_meeting()
            said = {"peer": encode_peer(plane.owner.endpoints()), "bare_port": listener.getsockname()[1]}
            answer(answers, said)
            await asyncio.to_thread(sys.stdin.read)
    finally:
        await plane.close()


async def need(order: dict[str, Any], answers: TextIO) -> None:
    peer = decode_peer(order["peer"])
    pool = make_pool(peer.num_blocks, peer.block_bytes)
    async with AsyncExitStack() as stack:
        ways: dict[str, Way] = {"memcpy": Memcpy(make_pool(peer.num_blocks, peer.block_bytes), pool)}
        sock = stack.enter_context(socket.create_connection(("127.0.0.1", order["bare_port"])))
        ways["socket"] = BareSocket(sock, pool)
        missing = {}
        for transport in order["transports"]:
            try:
                plane = await open_transfer(pool, make_options("needer", order, transport))
                stack.push_async_callback(plane.close)
                ways[transport] = Pull(await plane.needer.connect(peer))
            except TransferError as error:
                missing[transport] = error.message
        found = await _take_turns(ways, peer, pool, order)
    answer(answers, {"seconds": found, "missing": missing})


async def _take_turns(
    ways: dict[str, Way], peer: PeerEndpoints, pool: PoolMemory, order: dict[str, Any]
) -> dict[str, dict[str, list[float]]]:
    """Seconds by shape and way, one entry a round."""
    found: dict[str, dict[str, list[float]]] = {shape: {name: [] for name in ways} for shape in SHAPES}
    names, ranges = list(ways), _ranges(order)
    for turn in range(-1, order["rounds"]):
        shift = turn % len(names)
        for shape in SHAPES:
            for name in names[shift:] + names[:shift]:
                reads = make_reads(shape, next(ranges), peer)
                seconds = await ways[name].move(reads, plan_read(reads, pool).runs)
                _check_and_clear(pool, reads, name)
                if turn >= 0:
                    found[shape][name].append(seconds)
    return found


def _ranges(order: dict[str, Any]) -> Iterator[range]:
    """One after the other and again from the start, so that none is still in a cache when its turn comes."""
    size = order["num_blocks"]
    while True:
        for index in range(order["num_ranges"]):
            yield range(index * size, (index + 1) * size)


def make_reads(shape: str, blocks: range, peer: PeerEndpoints) -> list[BlockRead]:
    """Of the owner's `blocks`, into blocks of the same numbers: the same ones, or in the opposite order."""
    base = peer.nixl.pool_address if peer.nixl else 0
    targets = blocks if shape == "range" else reversed(blocks)
    return [BlockRead(s, base + s * peer.block_bytes, EPOCH << 32, t) for s, t in zip(blocks, targets, strict=True)]


def _check_and_clear(pool: PoolMemory, reads: Sequence[BlockRead], name: str) -> None:
    """First and last byte of each block: nobody is timed who moved nothing. Raises TransferError."""
    for read in reads:
        block = pool.bytes_of(read.target_block)
        if {block[0], block[-1]} != {1 + read.source_block % 251}:
            raise TransferError(f"{name} left block {read.target_block} with other bytes than the owner's")
        block[0] = block[-1] = 0


if __name__ == "__main__":
    take_part(own if sys.argv[1] == "owner" else need)

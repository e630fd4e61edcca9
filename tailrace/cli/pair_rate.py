"""How fast two idle processes of this machine move KV blocks, measured between two processes that do nothing else.

Run by `tailrace doctor` as `python -m tailrace.cli.pair_rate owner` and `... needer`, siblings as workers are. What
they must know arrives as one line of JSON on stdin, what they found out leaves as one line on stdout.
"""

import asyncio
import dataclasses
import json
import mmap
import os
import secrets
import subprocess
import sys
from typing import Any, TextIO

import numpy as np

from tailrace.config import UpConfig
from tailrace.errors import TailraceError, TransferError
from tailrace.transfer import (
    BlockRead,
    NixlEndpoint,
    PeerEndpoints,
    PoolMemory,
    StreamEndpoint,
    TransferOptions,
    open_transfer,
)
from tailrace.transfer.measure import PullRate, memcpy_bytes_per_s, pull_bytes_per_s

BLOCK_BYTES = 368_640
"""A block of 16 tokens of SmolLM2-135M in bfloat16."""
NUM_BLOCKS = 64
_EPOCH = 1
_TIMEOUT_S = 60


@dataclasses.dataclass(frozen=True, slots=True)
class PairRate:
    pull: PullRate
    memcpy_bytes_per_s: float


def measure_pair(config: UpConfig) -> PairRate:
    """Raises TransferError with the last words of the process that failed."""
    order = {"secret": secrets.token_hex(16), "transport": config.transport, "net_device": config.net_device}
    with _start("owner") as owner:
        try:
            peer = json.loads(_tell(owner, order))
            with _start("needer") as needer:
                found = json.loads(_tell(needer, order | {"peer": peer}))
                return PairRate(PullRate(**found["pull"]), found["memcpy_bytes_per_s"])
        finally:
            owner.kill()


def _start(role: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tailrace.cli.pair_rate", role]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)  # noqa: S603 - our own module


def _tell(process: subprocess.Popen[str], order: dict[str, Any]) -> str:
    """The line that it answers."""
    if process.stdin is None or process.stdout is None or process.stderr is None:
        raise TransferError("a measuring process was started without pipes")
    print(json.dumps(order), file=process.stdin, flush=True)
    if line := process.stdout.readline():
        return line
    said = process.stderr.read().strip().splitlines()
    raise TransferError(f"no pair could be made: {said[-1] if said else 'a process ended without a word'}")


def _make_pool() -> PoolMemory:
    region = mmap.mmap(-1, NUM_BLOCKS * BLOCK_BYTES)
    data = np.frombuffer(region, dtype=np.uint8)
    data[:] = 1
    stamps = np.full(NUM_BLOCKS, _EPOCH << 32, dtype=np.uint64)
    return PoolMemory(int(data.ctypes.data), BLOCK_BYTES, NUM_BLOCKS, memoryview(region), stamps)


def _options(role: str, order: dict[str, Any]) -> TransferOptions:
    return TransferOptions(
        worker_id=f"doctor-{role}",
        epoch=_EPOCH,
        role=role,
        secret=order["secret"].encode(),
        preference=order["transport"],
        net_device=order["net_device"],
    )


async def _own(order: dict[str, Any], answer: TextIO) -> None:
    """Lend the whole pool until stdin ends."""
    plane = await open_transfer(_make_pool(), _options("owner", order))
    try:
        with plane.owner.lending("nixl"):
            print(encode_peer(plane.owner.endpoints()), file=answer, flush=True)
            await asyncio.to_thread(sys.stdin.read)
    finally:
        await plane.close()


async def _need(order: dict[str, Any], answer: TextIO) -> None:
    peer = decode_peer(order["peer"])
    plane = await open_transfer(_make_pool(), _options("needer", order))
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            rate = await pull_bytes_per_s(await plane.needer.connect(peer), _reads(peer))
        found = PairRate(rate, memcpy_bytes_per_s(BLOCK_BYTES))
        print(json.dumps(dataclasses.asdict(found)), file=answer, flush=True)
    finally:
        await plane.close()


def _reads(peer: PeerEndpoints) -> list[BlockRead]:
    base = peer.nixl.pool_address if peer.nixl else 0
    return [BlockRead(i, base + i * BLOCK_BYTES, _EPOCH << 32, i) for i in range(NUM_BLOCKS)]


def encode_peer(peer: PeerEndpoints) -> str:
    """As JSON, bytes as hex."""
    return json.dumps(dataclasses.asdict(peer), default=bytes.hex)


def decode_peer(fields: dict[str, Any]) -> PeerEndpoints:
    nixl, stream = fields["nixl"], fields["stream"]
    if nixl is not None:
        raw = {name: bytes.fromhex(nixl[name]) for name in ("agent_metadata", "nonce")}
        nixl = NixlEndpoint(**{**nixl, **raw, "rdma_devices": tuple(nixl["rdma_devices"])})
    return PeerEndpoints(**{**fields, "nixl": nixl, "stream": StreamEndpoint(**stream) if stream else None})


def main(role: str) -> None:
    order = json.loads(sys.stdin.readline())
    # UCX writes its warnings to stdout, where only our one line may be.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        asyncio.run((_own if role == "owner" else _need)(order, answer))
    except (TailraceError, TimeoutError) as error:
        sys.exit(str(error) or "the pair did not finish in time")


if __name__ == "__main__":
    main(sys.argv[1])

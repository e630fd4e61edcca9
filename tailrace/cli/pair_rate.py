"""How fast two idle processes of this machine move KV blocks, measured between two processes that do nothing else.

Run by `tailrace doctor` as `python -m tailrace.cli.pair_rate owner` and `... needer`, siblings as workers are. What
they must know arrives as one line of JSON on stdin, what they found out leaves as one line on stdout.
"""

import asyncio
import dataclasses
import json
import secrets
import sys
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from typing import Any, TextIO

import numpy as np

from tailrace.cli.processes import answer, claim_stdout, start, tell
from tailrace.config import UpConfig
from tailrace.config_values import Transport
from tailrace.errors import TailraceError, TransferError, UnavailableError
from tailrace.host_memory import map_memory
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
EPOCH = 1
_TIMEOUT_S = 60
Work = Callable[[dict[str, Any], TextIO], Coroutine[Any, Any, None]]
"""What a process does with its order; it answers in one line."""


@dataclasses.dataclass(frozen=True, slots=True)
class PairRate:
    pull: PullRate
    memcpy_bytes_per_s: float


def measure_pair(config: UpConfig) -> PairRate:
    """Raises TransferError with the last words of the process that failed."""
    order = {"secret": secrets.token_hex(16), "transport": config.transport, "net_device": config.net_device}
    found = order_pair("tailrace.cli.pair_rate", order)
    return PairRate(PullRate(**found["pull"]), found["memcpy_bytes_per_s"])


def order_pair(module: str, order: dict[str, Any]) -> Any:
    """What the needer answers, who is told what the owner answered as well. Raises TransferError as measure_pair."""
    with ExitStack() as stack:
        owner = stack.enter_context(start(module, "owner"))
        stack.callback(owner.kill)
        try:
            lent = tell(owner, order)
            needer = stack.enter_context(start(module, "needer"))
            stack.callback(needer.kill)
            return tell(needer, order | lent)
        except UnavailableError as error:
            raise TransferError(f"no pair could be made: {error.message}") from None


def make_pool(num_blocks: int = NUM_BLOCKS, block_bytes: int = BLOCK_BYTES) -> PoolMemory:
    """Memory of the kind that a worker's blocks lie in, touched; block i holds 1 + i % 251 in every byte."""
    region = map_memory(num_blocks * block_bytes)
    data = np.frombuffer(region, dtype=np.uint8).reshape(num_blocks, block_bytes)
    data[:] = (1 + np.arange(num_blocks) % 251)[:, None]
    stamps = np.full(num_blocks, EPOCH << 32, dtype=np.uint64)
    return PoolMemory(int(data.ctypes.data), block_bytes, num_blocks, memoryview(region), stamps)


def make_options(role: str, order: dict[str, Any], transport: Transport) -> TransferOptions:
    return TransferOptions(
        worker_id=f"measured-{role}",
        epoch=EPOCH,
        role=role,
        secret=order["secret"].encode(),
        preference=transport,
        net_device=order["net_device"],
    )


async def _own(order: dict[str, Any], answers: TextIO) -> None:
    """Lend the whole pool until stdin ends."""
    plane = await open_transfer(make_pool(), make_options("owner", order, order["transport"]))
    try:
        with plane.owner.lending("nixl"):
            answer(answers, {"peer": encode_peer(plane.owner.endpoints())})
            await asyncio.to_thread(sys.stdin.read)
    finally:
        await plane.close()


async def _need(order: dict[str, Any], answers: TextIO) -> None:
    peer = decode_peer(order["peer"])
    plane = await open_transfer(make_pool(), make_options("needer", order, order["transport"]))
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            rate = await pull_bytes_per_s(await plane.needer.connect(peer), _reads(peer))
        found = PairRate(rate, memcpy_bytes_per_s(BLOCK_BYTES))
        answer(answers, dataclasses.asdict(found))
    finally:
        await plane.close()


def _reads(peer: PeerEndpoints) -> list[BlockRead]:
    base = peer.nixl.pool_address if peer.nixl else 0
    return [BlockRead(i, base + i * BLOCK_BYTES, EPOCH << 32, i) for i in range(NUM_BLOCKS)]


def encode_peer(peer: PeerEndpoints) -> dict[str, Any]:
    """For JSON, bytes as hex."""
    fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(peer), default=bytes.hex))
    return fields


def decode_peer(fields: dict[str, Any]) -> PeerEndpoints:
    nixl, stream = fields["nixl"], fields["stream"]
    if nixl is not None:
        raw = {name: bytes.fromhex(nixl[name]) for name in ("agent_metadata", "nonce")}
        nixl = NixlEndpoint(**{**nixl, **raw, "rdma_devices": tuple(nixl["rdma_devices"])})
    return PeerEndpoints(**{**fields, "nixl": nixl, "stream": StreamEndpoint(**stream) if stream else None})


def take_part(work: Work) -> None:
    """A measuring process, from the order on stdin to its end."""
    order = json.loads(sys.stdin.readline())
    answers = claim_stdout()
    try:
        asyncio.run(work(order, answers))
    except (TailraceError, TimeoutError) as error:
        sys.exit(str(error) or "the pair did not finish in time")


if __name__ == "__main__":
    take_part(_own if sys.argv[1] == "owner" else _need)

"""Pools for transfer tests: page-aligned memory with contents that a seed tells."""

import dataclasses
import mmap
from typing import Any

import numpy as np

from tailrace.transfer import BlockRead, NixlEndpoint, PeerEndpoints, PoolMemory, StreamEndpoint, TransferOptions

SECRET = b"a secret of the test's own cluster"


def make_pool(num_blocks: int = 32, block_bytes: int = 4096, *, seed: int = 0, epoch: int = 1) -> PoolMemory:
    """Block contents are random bytes of `seed` (zeros for seed 0); stamps start at (epoch << 32) + index."""
    region = mmap.mmap(-1, num_blocks * block_bytes)
    data = np.frombuffer(region, dtype=np.uint8)
    if seed:
        data[:] = contents(num_blocks, block_bytes, seed).reshape(-1)
    stamps = np.arange(num_blocks, dtype=np.uint64) + np.uint64(epoch << 32)
    return PoolMemory(int(data.ctypes.data), block_bytes, num_blocks, memoryview(region), stamps)


def contents(num_blocks: int, block_bytes: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_blocks, block_bytes), dtype=np.uint8)


def blocks_of(pool: PoolMemory) -> np.ndarray:
    """[num_blocks, block_bytes], sharing the pool's memory."""
    return np.frombuffer(pool.view, dtype=np.uint8).reshape(pool.num_blocks, pool.block_bytes)


def make_options(worker_id: str = "needer", **changes: Any) -> TransferOptions:
    return TransferOptions(**{"worker_id": worker_id, "epoch": 1, "role": "test", "secret": SECRET} | changes)


def make_reads(peer: PeerEndpoints, sources: list[int], targets: list[int]) -> list[BlockRead]:
    """Reads of a pool of `make_pool` whose stamps are still those of the start."""
    base = peer.nixl.pool_address if peer.nixl else 0
    return [
        BlockRead(source, base + source * peer.block_bytes, (peer.epoch << 32) + source, target)
        for source, target in zip(sources, targets, strict=True)
    ]


def peer_to_json(peer: PeerEndpoints) -> dict[str, Any]:
    fields = dataclasses.asdict(peer)
    if peer.nixl:
        fields["nixl"] |= {"agent_metadata": peer.nixl.agent_metadata.hex(), "nonce": peer.nixl.nonce.hex()}
    return fields


def peer_from_json(fields: dict[str, Any]) -> PeerEndpoints:
    nixl, stream = fields["nixl"], fields["stream"]
    if nixl:
        raw = {name: bytes.fromhex(nixl[name]) for name in ("agent_metadata", "nonce")}
        nixl = NixlEndpoint(**nixl | raw | {"rdma_devices": tuple(nixl["rdma_devices"])})
    return PeerEndpoints(**fields | {"nixl": nixl, "stream": StreamEndpoint(**stream) if stream else None})

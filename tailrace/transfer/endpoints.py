"""Where and how an owner's blocks can be read: what a Meet answers, one dataclass for each message of kv.proto."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NixlEndpoint:
    """What a needer must know to read one-sidedly. `agent_metadata` is opaque; take it from authenticated peers."""

    agent_name: str
    agent_metadata: bytes
    pool_address: int
    stamps_address: int
    nonce_address: int
    nonce: bytes
    pid: int
    boot_id: str
    memory: str
    device: int
    rdma_devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StreamEndpoint:
    host: str
    port: int
    tls: bool


@dataclass(frozen=True, slots=True)
class PeerEndpoints:
    """An owner, named by worker id and epoch. A transport that it does not offer is None."""

    worker_id: str
    epoch: int
    block_bytes: int
    num_blocks: int
    nixl: NixlEndpoint | None
    stream: StreamEndpoint | None

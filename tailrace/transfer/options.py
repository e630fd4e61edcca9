"""What a worker is told about transfers: its identity, the transports it may use and how the stream is guarded."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tailrace.errors import ConfigError

Preference = Literal["auto", "nixl", "stream"]

MIN_SECRET_BYTES = 16
MAX_WORKER_ID_BYTES = 255


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. Both sides present `cert` and accept what `ca` has signed (for a self-signed pair, `cert` itself)."""

    cert: Path
    key: Path
    ca: Path


@dataclass(frozen=True, slots=True)
class TransferOptions:
    """Raises ConfigError, naming the option, for what can never work."""

    worker_id: str
    epoch: int
    role: str
    secret: bytes = field(repr=False)
    """Shared by the whole cluster; both ends of a stream prove that they know it."""
    preference: Preference = "auto"
    net_device: str = "lo"
    """UCX_NET_DEVICES of the nixl agent, where the environment sets none: an interface, or RDMA ports (mlx5_0:1)."""
    tls: TlsFiles | None = None
    stream_host: str = "127.0.0.1"
    stream_port: int = 0
    """0: any free port."""
    advertised_host: str = ""
    """What needers are told to connect to; empty: `stream_host`."""
    max_connections: int = 256
    handshake_timeout_s: float = 5.0
    proof_timeout_s: float = 3.0
    meeting_window_s: float = 5.0
    """How long an owner drives nixl's progress after a Meet, so that the needer's first contact can complete."""

    def __post_init__(self) -> None:
        if self.preference not in ("auto", "nixl", "stream"):
            raise ConfigError(f"transport: auto, nixl or stream, not {self.preference!r}", param="transport")
        if len(self.secret) < MIN_SECRET_BYTES:
            raise ConfigError(f"cluster secret: at least {MIN_SECRET_BYTES} bytes are needed", param="secret")
        if not 0 < len(self.worker_id.encode()) <= MAX_WORKER_ID_BYTES:
            raise ConfigError(f"worker id: 1 to {MAX_WORKER_ID_BYTES} bytes are needed", param="worker_id")
        if not 0 <= self.epoch < 1 << 64:
            raise ConfigError("epoch: 64 bits without a sign are needed", param="epoch")
        if not 0 <= self.stream_port < 1 << 16:
            raise ConfigError(f"transfer port: 0 to 65535, not {self.stream_port}", param="stream_port")

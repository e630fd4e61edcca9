"""One verb moves KV: the needer reads what an owner lends, over a transport that the pair has proved."""

from tailrace.transfer.endpoints import NixlEndpoint, PeerEndpoints, StreamEndpoint
from tailrace.transfer.lend import Owner
from tailrace.transfer.memory import PoolMemory
from tailrace.transfer.options import TlsFiles, TransferOptions
from tailrace.transfer.plane import TransferPlane, open_transfer
from tailrace.transfer.pull import Needer
from tailrace.transfer.reads import BlockRead, Link, PendingRead, ReadOutcome, ReadResult

__all__ = [
    "BlockRead",
    "Link",
    "Needer",
    "NixlEndpoint",
    "Owner",
    "PeerEndpoints",
    "PendingRead",
    "PoolMemory",
    "ReadOutcome",
    "ReadResult",
    "StreamEndpoint",
    "TlsFiles",
    "TransferOptions",
    "TransferPlane",
    "open_transfer",
]

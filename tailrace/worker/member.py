"""What every owner of blocks does to be a member of a cluster, whether it computes or only keeps: its identity, its
address, the gateways that it joins, and Redis."""

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pydantic import SecretStr

from tailrace.config_values import Transport
from tailrace.errors import ConfigError, TailraceError
from tailrace.index.keys import KeySpace
from tailrace.index.publisher import Publisher
from tailrace.index.redis_client import RedisClient
from tailrace.index.redis_url import RedisUrl
from tailrace.index.registry import Registration
from tailrace.kv.events import KVEvents
from tailrace.rpc.client import Peer
from tailrace.transfer import TlsFiles, TransferOptions
from tailrace.types import Role
from tailrace.worker.attach import Attachments
from tailrace.worker.life import new_epoch

log = logging.getLogger(__name__)

REJOIN_S = 0.5


class MemberSettings(Protocol):
    """What the configurations of all owners of blocks have in common."""

    @property
    def worker_id(self) -> str: ...
    @property
    def secret(self) -> SecretStr: ...
    @property
    def host(self) -> str: ...
    @property
    def advertise(self) -> str: ...
    @property
    def join(self) -> tuple[str, ...]: ...
    @property
    def redis_url(self) -> RedisUrl | None: ...
    @property
    def redis_namespace(self) -> str: ...
    @property
    def data_host(self) -> str: ...
    @property
    def transport(self) -> Transport: ...
    @property
    def net_device(self) -> str: ...
    @property
    def tls_cert(self) -> Path | None: ...
    @property
    def tls_key(self) -> Path | None: ...
    @property
    def tls_ca(self) -> Path | None: ...


@dataclass(frozen=True, slots=True)
class Identity:
    """`epoch` names this life of the process: 32 bits that go up with every restart."""

    role: Role
    worker_id: str
    epoch: int
    secret: bytes

    @classmethod
    def draw(cls, config: MemberSettings, role: Role) -> "Identity":
        """Raises ConfigError when no cluster secret is set."""
        secret = config.secret.get_secret_value().encode()
        if not secret:
            raise ConfigError("secret: set TAILRACE_SECRET to the same value for the gateway and all workers")
        worker_id = config.worker_id or f"{role}-{socket.gethostname()}-{os.getpid()}"
        return cls(role, worker_id, new_epoch(), secret)


def advertised_address(config: MemberSettings, port: int) -> str:
    """host:port of the gRPC server, as others reach it."""
    host = config.advertise or config.host
    return host if ":" in host else f"{host}:{port}"


def transfer_options(config: MemberSettings, identity: Identity) -> TransferOptions:
    tls = None
    if config.tls_cert is not None and config.tls_key is not None:
        tls = TlsFiles(config.tls_cert, config.tls_key, config.tls_ca or config.tls_cert)
    return TransferOptions(
        worker_id=identity.worker_id,
        epoch=identity.epoch,
        role=identity.role,
        secret=identity.secret,
        preference=config.transport,
        net_device=config.net_device,
        tls=tls,
        stream_host=config.data_host or config.host,
        advertised_host=config.advertise.partition(":")[0],
    )


class Membership:
    """Joined to the gateways, and registered in Redis, from its making until `close`. Event loop only."""

    def __init__(
        self,
        config: MemberSettings,
        attachments: Attachments,
        secret: bytes,
        *,
        cached: Callable[[], Awaitable[KVEvents]],
    ) -> None:
        """`cached`: publications of all that it holds."""
        address = attachments.info.address
        self._tasks = [
            asyncio.create_task(stay_joined(gateway, address, secret), name=f"join {gateway}")
            for gateway in config.join
        ]
        if (publisher := redis_publisher(config, attachments, secret, cached=cached)) is not None:
            self._tasks.append(asyncio.create_task(publisher.run(), name="redis"))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def redis_publisher(
    config: MemberSettings,
    attachments: Attachments,
    secret: bytes,
    *,
    cached: Callable[[], Awaitable[KVEvents]],
) -> Publisher | None:
    """None: the configuration names no Redis. Hears from here on what the sessions of gateways hear."""
    if (url := config.redis_url) is None:
        return None
    info = attachments.info
    registration = Registration(
        worker_id=info.worker_id,
        epoch=info.epoch,
        edition=0,
        role=info.role,
        address=info.address,
        model_digest=info.layout.model_digest,
        num_blocks=info.num_blocks,
        sequence=attachments.kv_sequence,
    )
    keys = KeySpace(config.redis_namespace)
    publisher = Publisher(RedisClient(url), keys, secret, registration, cached=cached)
    attachments.on_kv_events = publisher.offer
    return publisher


async def stay_joined(gateway: str, address: str, secret: bytes) -> None:
    """A member of the gateway for as long as it is there; joins again when it comes back."""
    peer = Peer(gateway, secret)
    try:
        while True:
            try:
                await peer.join(address, lambda name: log.info("joined gateway %s at %s", name, gateway))
            except TailraceError as error:
                log.info("not a member of %s: %s", gateway, error.message)
            await asyncio.sleep(REJOIN_S)
    finally:
        await peer.close()

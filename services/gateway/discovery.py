"""Workers that nobody named to this gateway: found in the registry, attached to, and let go of when they are gone."""

from collections.abc import AsyncIterator, Mapping

from services.gateway.members import Members
from tailrace.config import GatewayConfig
from tailrace.index.feeds import Snapshot
from tailrace.index.keys import KeySpace
from tailrace.index.mirror import Mirror
from tailrace.index.redis_client import RedisClient
from tailrace.index.registry import Registration, Registry
from tailrace.messages import KvEventBatch
from tailrace.rpc.client import Peer
from tailrace.types import Role

_ATTACHED_ROLES = frozenset(Role)


class Discovery:
    """Keeps `members` as the registry says. Event loop only."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._found: set[str] = set()
        """Addresses that are members for what is said here."""

    def see(self, workers: Mapping[str, Registration]) -> None:
        """A worker that is attached stays, whatever Redis says: its own stream knows best whether it lives."""
        wanted = {worker.address for worker in workers.values() if worker.role in _ATTACHED_ROLES}
        for address in sorted(wanted - self._found):
            self._members.add(address)
        gone = {address for address in self._found - wanted if not self._members.is_attached(address)}
        for address in sorted(gone):
            self._members.remove(address)
        self._found = (self._found | wanted) - gone


def open_mirror(config: GatewayConfig, members: Members, model_digest: str) -> Mirror | None:
    """None: the configuration names no Redis. Nothing runs yet."""
    if (url := config.redis_url) is None:
        return None
    client, keys, secret = RedisClient(url), KeySpace(config.redis_namespace), config.secret.get_secret_value().encode()

    def snapshot_of(worker: Registration) -> Snapshot:
        return lambda: _snapshot(worker.address, secret)

    return Mirror(
        client,
        keys,
        Registry(client, keys, secret),
        members.feeds,
        gateway_id=members.gateway_id,
        model_digest=model_digest,
        snapshot=snapshot_of,
        seen=Discovery(members).see,
    )


async def _snapshot(address: str, secret: bytes) -> AsyncIterator[KvEventBatch]:
    """Of a worker, attached or not."""
    peer = Peer(address, secret)
    try:
        async for batch in peer.snapshot():
            yield batch
    finally:
        await peer.close()

"""What this gateway has in flight, told to the others over Redis, and theirs counted in its prices."""

import secrets
import time
from collections.abc import Callable

from services.gateway.members import Members
from tailrace.config import GatewayConfig
from tailrace.index.exchange import Exchange
from tailrace.index.keys import KeySpace
from tailrace.index.redis_client import RedisClient
from tailrace.policy.other_routers import InFlight, RouterNews
from tailrace.policy.router import Router


def open_exchange(
    config: GatewayConfig, members: Members, router: Router, clock: Callable[[], float] = time.monotonic
) -> Exchange | None:
    """None: the configuration names no Redis. Nothing runs yet. `clock` is the one by which `router` is asked."""
    if (url := config.redis_url) is None:
        return None

    def news() -> RouterNews:
        return router.news(unreported(members), clock())

    def hear(router_id: str, told: RouterNews, ttl_s: float) -> None:
        router.hear(router_id, told, clock(), ttl_s)

    # Gateways in containers may share a name and a process id: what follows is this process's alone.
    router_id = f"{members.gateway_id}/{secrets.token_hex(8)}"
    exchange = Exchange(
        RedisClient(url),
        KeySpace(config.redis_namespace),
        router_id=router_id,
        secret=config.secret.get_secret_value().encode(),
        news=news,
        hear=hear,
    )
    router.share(router_id, exchange.changed)
    return exchange


def unreported(members: Members) -> dict[str, InFlight]:
    """What was submitted and no load report can know yet, by worker id."""
    told = {member.info.worker_id: member.unreported for member in members.all()}
    return {worker_id: there for worker_id, there in told.items() if there.sequences}

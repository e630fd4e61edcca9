"""The store's process."""

import logging

from services.kvstore.membership import StoreMembership
from services.kvstore.metrics import serve_metrics
from services.kvstore.node import StoreNode
from services.kvstore.servicer import add_store
from services.kvstore.storage import check_memory, known_layout
from tailrace.config import KvStoreConfig
from tailrace.rpc.server import Server
from tailrace.types import Role
from tailrace.worker.life import run_process, until_told
from tailrace.worker.member import Identity, advertised_address

log = logging.getLogger(__name__)


def main() -> None:
    run_process(Role.KVSTORE, KvStoreConfig, run)


async def run(config: KvStoreConfig) -> None:
    """Serve until SIGTERM or SIGINT. Raises ConfigError for what can never work."""
    check_memory(config.cpu_memory)
    identity = Identity.draw(config, Role.KVSTORE)
    server = Server(identity.secret)
    address = advertised_address(config, server.bind(config.host, config.port))
    node = StoreNode(config, identity, StoreMembership(config, identity, address))
    add_store(server, node)
    try:
        if (layout := known_layout(config.disk_path)) is not None:
            await node.open(layout)
        if config.metrics_port is not None:
            metrics_port = serve_metrics(node, config.host, config.metrics_port)
            log.info("metrics on http://%s:%d/metrics", config.host, metrics_port)
        await server.start()
        node.membership.serve(node.cached)
        log.info("ready on %s", address)
        await until_told(config.parent_pid)
    finally:
        await server.stop()
        await node.close()


if __name__ == "__main__":
    main()

"""The store's process."""

import asyncio
import logging
import os
import socket
import sys

from setproctitle import setproctitle

from services.kvstore.metrics import serve_metrics
from services.kvstore.node import StoreNode
from services.kvstore.servicer import add_store
from services.kvstore.storage import StoreIdentity, known_layout
from tailrace.config import KvStoreConfig
from tailrace.errors import ConfigError, TailraceError
from tailrace.rpc.server import Server
from tailrace.telemetry.log import configure_logging
from tailrace.worker.life import leave, new_epoch, until_told

log = logging.getLogger(__name__)


def main() -> None:
    setproctitle("tailrace kvstore")
    config = KvStoreConfig.or_exit()
    configure_logging(
        role="kvstore",
        worker_id=config.worker_id,
        level=config.log_level,
        style=config.log_format,
        secrets=(config.secret.get_secret_value(),),
    )
    try:
        asyncio.run(run(config))
    except TailraceError as error:
        print(f"tailrace kvstore: {error.message}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None
    leave()


async def run(config: KvStoreConfig) -> None:
    """Serve until SIGTERM or SIGINT. Raises ConfigError for what can never work."""
    secret = config.secret.get_secret_value().encode()
    if not secret:
        raise ConfigError("secret: set TAILRACE_SECRET to the same value for the gateway and all workers")
    identity = StoreIdentity(config.worker_id or f"kvstore-{socket.gethostname()}-{os.getpid()}", new_epoch(), secret)
    server = Server(secret)
    port = server.bind(config.host, config.port)
    node = StoreNode(config, identity)
    add_store(server, node)
    try:
        if (layout := known_layout(config.disk_path)) is not None:
            await node.open(layout)
        if config.metrics_port is not None:
            metrics_port = serve_metrics(node, config.host, config.metrics_port)
            log.info("metrics on http://%s:%d/metrics", config.host, metrics_port)
        await server.start()
        log.info("ready on %s", _address(config, port))
        await until_told(config.parent_pid)
    finally:
        await server.stop()
        await node.close()


def _address(config: KvStoreConfig, port: int) -> str:
    host = config.advertise or config.host
    return host if ":" in host else f"{host}:{port}"


if __name__ == "__main__":
    main()

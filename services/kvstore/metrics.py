"""What the store says of itself, for Prometheus. Read when it is asked for."""

from collections.abc import Iterator
from dataclasses import asdict

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.kvstore.node import StoreNode
from tailrace.errors import ConfigError


class StoreCollector(Collector):
    def __init__(self, node: StoreNode) -> None:
        self._node = node

    def collect(self) -> Iterator[Metric]:
        storage = self._node.storage
        slots = GaugeMetricFamily("tailrace_store_slots", "Slots of a tier by state.", labels=("tier", "state"))
        disk_on = GaugeMetricFamily("tailrace_store_disk_on", "1 while the disk tier is used.")
        unwritten = GaugeMetricFamily("tailrace_store_unwritten_blocks", "Blocks in line to be written to disk.")
        blocks = CounterMetricFamily(
            "tailrace_store_blocks",
            "What the store did with blocks, by what it did.",
            labels=("what",),
        )
        if storage is not None:
            store = storage.store
            books = store.ledger()
            for tier, ledger in (("memory", books.memory), ("disk", books.disk)):
                for state, number in asdict(ledger).items():
                    if state != "total":
                        slots.add_metric((tier, state), number)
            unwritten.add_metric((), books.unwritten)
            for what, number in asdict(store.counters).items():
                blocks.add_metric((what,), number)
            disk_on.add_metric((), float(store.disk is not None and store.disk.is_on))
        yield from (slots, disk_on, unwritten, blocks)


def serve_metrics(node: StoreNode, host: str, port: int) -> int:
    """The port that they are served on, by a thread. Raises ConfigError when it is in use."""
    registry = CollectorRegistry()
    registry.register(StoreCollector(node))
    try:
        server, _ = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise ConfigError(f"metrics_port: {host}:{port}: {error}", param="metrics_port") from None
    return int(server.server_port)

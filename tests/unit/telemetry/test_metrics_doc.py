"""docs/metrics.md names every metric of the gateway and the store, with its type and labels, and no other."""

import re
from pathlib import Path
from types import SimpleNamespace

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from services.gateway.http_metrics import HttpMetrics
from services.kvstore.metrics import StoreCollector
from tailrace.messages import LinkCount, Load
from tailrace.telemetry.metrics import GatewayMetrics, IndexSample, RedisSample, WorkerSample, render
from tailrace.types import Role
from tests.helpers.stores import make_store

ROW = re.compile(r"^\| `(tailrace_\w+)` \| (\w+) \|([^|]*)\|", re.MULTILINE)
DOC = Path(__file__).parents[3] / "docs" / "metrics.md"


def exported():
    """name -> (type, labels), each metric having been touched once."""
    http, registry = HttpMetrics(), CollectorRegistry()
    load = Load(links=(LinkCount("nixl", "", 1),))
    index = IndexSample(1, RedisSample(True, 1, 0))
    gateway = GatewayMetrics(registry, lambda: [WorkerSample("d0", Role.DECODE, load)], lambda: index)
    http.requests.labels("GET", "/", "200")
    http.disconnects.labels("left")
    http.tokens.labels("prompt")
    gateway.worker_lost(Role.DECODE)
    gateway.replayed("worker_lost")
    gateway.cached(1, tier="worker")
    node = SimpleNamespace(storage=SimpleNamespace(store=make_store()))
    registry.register(StoreCollector(node))
    found = {}
    for family in text_string_to_metric_families((http.text() + render(registry)).decode()):
        if family.name.endswith("_created"):
            continue
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[name] = (family.type, labels)
    return found


def test_the_table_is_complete_and_true():
    table = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in ROW.findall(DOC.read_text())}
    assert table == exported()

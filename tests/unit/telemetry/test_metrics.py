from prometheus_client import CollectorRegistry

from tailrace.telemetry.metrics import BlockCounts, GatewayMetrics, WorkerMetrics, render


def test_a_worker_counts_its_blocks_by_state():
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry)
    metrics.set_blocks(BlockCounts(free=5, active=1, cached=2, lent=0, landing=3, quarantined=0))
    states = ("free", "active", "cached", "lent", "landing", "quarantined")
    assert [registry.get_sample_value("tailrace_kv_blocks", {"state": state}) for state in states] == [5, 1, 2, 0, 3, 0]


def test_pulls_are_counted_by_transport_and_outcome():
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry)
    metrics.pulled(1000, 0.01, transport="nixl", outcome="good")
    metrics.pulled(500, 0.01, transport="nixl", outcome="stale")
    good = {"transport": "nixl", "outcome": "good"}
    assert registry.get_sample_value("tailrace_transfer_bytes_total", good) == 1000
    assert registry.get_sample_value("tailrace_transfer_seconds_count", good) == 1


def test_replays_are_counted_by_cause():
    registry = CollectorRegistry()
    metrics = GatewayMetrics(registry)
    metrics.replayed("worker_lost")
    metrics.replayed("worker_lost")
    assert registry.get_sample_value("tailrace_replays_total", {"cause": "worker_lost"}) == 2


def test_two_registries_share_nothing():
    first, second = CollectorRegistry(), CollectorRegistry()
    GatewayMetrics(first).set_workers("decode", 2)
    GatewayMetrics(second)
    assert b'tailrace_workers{role="decode"} 2.0' in render(first)
    assert b"tailrace_workers{" not in render(second)

from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from tailrace.messages import LinkCount, Load
from tailrace.telemetry.metrics import GatewayMetrics, WorkerSample, render
from tailrace.types import Role

LOAD = Load(
    num_waiting=3,
    num_running=2,
    total_blocks=21,
    free_blocks=1,
    active_blocks=2,
    cached_blocks=3,
    lent_blocks=4,
    landing_blocks=5,
    quarantined_blocks=6,
    prefill_tokens_per_s=1000.0,
    decode_step_s=0.02,
    transfer_bytes_per_s=5e9,
)


def gateway(*samples):
    registry = CollectorRegistry()
    return registry, GatewayMetrics(registry, lambda: samples)


def test_every_block_of_a_worker_is_in_one_state():
    registry, _ = gateway(WorkerSample("d0", Role.DECODE, LOAD))
    states = ("free", "active", "cached", "lent", "landing", "quarantined")
    labels = {"worker": "d0", "role": "decode"}
    blocks = [registry.get_sample_value("tailrace_kv_blocks", {**labels, "state": state}) for state in states]
    assert blocks == [1, 2, 3, 4, 5, 6]
    assert sum(blocks) == LOAD.total_blocks


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("waiting", 3),
        ("running", 2),
        ("prefill_tokens_per_s", 1000.0),
        ("decode_step_seconds", 0.02),
        ("transfer_bytes_per_s", 5e9),
    ],
)
def test_a_workers_last_load_report_is_shown(name, value):
    registry, _ = gateway(WorkerSample("d0", Role.DECODE, LOAD), WorkerSample("p0", Role.PREFILL, Load()))
    shown = [
        registry.get_sample_value(f"tailrace_worker_{name}", {"worker": worker, "role": role})
        for worker, role in (("d0", "decode"), ("p0", "prefill"))
    ]
    assert shown == [value, 0]


def test_links_are_counted_by_transport_and_by_why_that_is_not_nixl():
    links = (LinkCount("nixl", "", 2), LinkCount("stream", "unproved", 1))
    registry, _ = gateway(WorkerSample("d0", Role.DECODE, replace(LOAD, links=links)))
    labels = {"worker": "d0", "role": "decode"}
    shown = [
        registry.get_sample_value("tailrace_worker_links", {**labels, "transport": transport, "why_not_nixl": why})
        for transport, why in (("nixl", ""), ("stream", "unproved"))
    ]
    assert shown == [2, 1]


def test_a_worker_that_has_left_is_in_no_gauge():
    samples = [WorkerSample("d0", Role.DECODE, LOAD), WorkerSample("d1", Role.DECODE, LOAD)]
    registry = CollectorRegistry()
    GatewayMetrics(registry, lambda: samples)
    assert render(registry).count(b'worker="d1"') == 12
    del samples[1]
    assert b"d1" not in render(registry)
    assert b'tailrace_workers{role="decode"} 1.0' in render(registry)


def test_roles_without_a_worker_are_counted_as_none():
    registry, _ = gateway()
    assert [registry.get_sample_value("tailrace_workers", {"role": role}) for role in ("prefill", "decode")] == [0, 0]


def test_workers_are_counted_by_what_carries_their_steps():
    registry, _ = gateway(
        WorkerSample("d0", Role.DECODE, LOAD, uses_line=True),
        WorkerSample("d1", Role.DECODE, LOAD),
        WorkerSample("p0", Role.PREFILL, LOAD, uses_line=True),
    )
    shown = [registry.get_sample_value("tailrace_attached_workers", {"steps": steps}) for steps in ("line", "grpc")]
    assert shown == [2, 1]


def test_what_happens_is_counted():
    registry, metrics = gateway()
    metrics.replayed("worker_lost")
    metrics.replayed("worker_lost")
    metrics.worker_lost(Role.PREFILL)
    metrics.cached(48, tier="worker")
    metrics.cached(16, tier="worker")
    assert registry.get_sample_value("tailrace_replays_total", {"cause": "worker_lost"}) == 2
    assert registry.get_sample_value("tailrace_workers_lost_total", {"role": "prefill"}) == 1
    assert registry.get_sample_value("tailrace_prefix_hit_tokens_total", {"tier": "worker"}) == 64


def test_two_registries_share_nothing():
    one, metrics = gateway(WorkerSample("d0", Role.DECODE, LOAD))
    other, _ = gateway()
    metrics.worker_lost(Role.DECODE)
    assert b"d0" not in render(other)
    assert other.get_sample_value("tailrace_workers_lost_total", {"role": "decode"}) is None
    assert one.get_sample_value("tailrace_workers_lost_total", {"role": "decode"}) == 1

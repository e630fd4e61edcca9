"""What metrics and traces see of a request, played through the real dispatcher."""

from contextlib import asynccontextmanager

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from prometheus_client import CollectorRegistry

from services.gateway import observer as observer_module
from services.gateway.observer import Observer, open_tracer
from tailrace.errors import InternalError, WorkerLostError
from tailrace.messages import LegReport
from tailrace.telemetry.metrics import GatewayMetrics
from tailrace.telemetry.trace import RequestTracer
from tailrace.types import FinishReason
from tests.helpers.fake_members import collect, events_and_error, fake_cluster, settle

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@asynccontextmanager
async def watched(**sizes):
    exporter, registry = InMemorySpanExporter(), CollectorRegistry()
    tracer = RequestTracer(SimpleSpanProcessor(exporter))
    async with fake_cluster(**sizes) as cluster:
        observer = Observer(GatewayMetrics(registry, list), tracer, "a-model")
        cluster.dispatcher.on_begun, cluster.dispatcher.on_ended = observer.begun, observer.ended
        yield cluster, exporter, registry
        assert observer._spans == {}
    await observer.close()


async def test_a_finished_request_is_one_trace():
    async with watched() as (cluster, exporter, registry):
        session = await cluster.submit(traceparent=PARENT, tracestate="v=1")
        submitted = [cluster.prefill.last, cluster.decode.last]
        tiers = {"worker": 3, "cpu": 1}
        await cluster.prefill.tokens([11], report=LegReport(0, prefill_s=1e-4, cached_tokens=4, cached_by_tier=tiers))
        report = LegReport(0, transport="nixl", transfer_bytes=77)
        await cluster.decode.tokens([11, 12], report=report, reason=FinishReason.LENGTH)
        await collect(session)
        *children, root = exporter.get_finished_spans()
    assert {child.name for child in children} <= {"queue", "prefill", "transfer", "decode"}
    assert "transfer" in {child.name for child in children}
    attributes = dict(root.attributes)
    assert attributes.pop("tailrace.ttft_s") > 0
    assert attributes == {
        "gen_ai.request.model": "a-model",
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.response.finish_reasons": ("length",),
        "tailrace.request_id": "r",
        "tailrace.outcome": "finished",
        "tailrace.num_attempts": 1,
        "tailrace.cached_tokens": 4,
        "tailrace.transport": "nixl",
        "tailrace.transfer_bytes": 77,
        "tailrace.prefill_workers": ("p0",),
        "tailrace.decode_workers": ("d0",),
    }
    mine = f"00-{PARENT.split('-')[1]}-{root.context.span_id:016x}-01"
    assert [(s.traceparent, s.tracestate) for s in submitted] == [(mine, "v=1")] * 2
    for tier, count in tiers.items():
        assert registry.get_sample_value("tailrace_prefix_hit_tokens_total", {"tier": tier}) == count


async def test_a_failed_request_says_why_and_where_it_was_tried():
    async with watched(decode=2) as (cluster, exporter, _):
        session = await cluster.submit()
        _, first = cluster.pair_of(session)
        await first.fail(WorkerLostError("gone"))
        await settle()
        _, second = cluster.pair_of(session)
        await second.fail(InternalError("no logits"))
        await events_and_error(session)
        root = exporter.get_finished_spans()[-1]
    assert (root.status.status_code, root.status.description) == (StatusCode.ERROR, "no logits")
    assert (root.attributes["error.type"], root.attributes["tailrace.outcome"]) == ("internal", "failed")
    assert root.attributes["tailrace.num_attempts"] == 2
    assert root.attributes["tailrace.decode_workers"] == (first.info.worker_id, second.info.worker_id)
    assert "tailrace.ttft_s" not in root.attributes


async def test_a_client_that_leaves_is_no_error():
    async with watched() as (cluster, exporter, _):
        session = await cluster.submit()
        await session.aclose()
        root = exporter.get_finished_spans()[-1]
    assert (root.status.status_code, root.attributes["tailrace.outcome"]) == (StatusCode.UNSET, "cancelled")


async def test_without_a_tracer_the_callers_context_goes_to_the_workers_as_it_is():
    async with fake_cluster() as cluster:
        observer = Observer(GatewayMetrics(CollectorRegistry(), list), None, "m")
        cluster.dispatcher.on_begun, cluster.dispatcher.on_ended = observer.begun, observer.ended
        session = await cluster.submit(traceparent=PARENT)
        assert cluster.decode.last.traceparent == PARENT
        await session.aclose()
        await observer.close()


@pytest.mark.parametrize(("protocol", "why"), [("pigeon", "must be one of"), ("grpc", "need the package")])
def test_spans_that_cannot_be_sent_are_a_warning_and_nothing_else(monkeypatch, caplog, protocol, why):
    monkeypatch.setattr(observer_module, "otlp_protocol", lambda: protocol)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: ())
    assert open_tracer() is None
    assert why in caplog.text

import itertools
import subprocess
import sys

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from tailrace.config import otlp_protocol
from tailrace.errors import ConfigError
from tailrace.lifecycle import RequestState
from tailrace.telemetry.trace import Phase, RequestTracer, otlp_tracer, phases

S = RequestState
PAIR = [S.RECEIVED, S.ROUTED, S.QUEUED, S.PREFILLING, S.TRANSFERRING, S.DECODING, S.FINISHED]
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def moves(states, *times):
    return list(zip(states, times, strict=True))


@pytest.fixture
def traced():
    exporter = InMemorySpanExporter()
    tracer = RequestTracer(SimpleSpanProcessor(exporter))
    yield tracer, exporter
    tracer.close()


# -- phases -----------------------------------------------------------------------------------------------------------


def test_each_state_that_lasted_is_a_phase():
    assert phases(moves(PAIR, 0, 1, 1, 3, 6, 10, 15), 3.0) == [
        Phase("queue", 1, 3),
        Phase("prefill", 3, 6),
        Phase("transfer", 6, 10),
        Phase("decode", 10, 15),
    ]


def test_a_prefill_on_the_decode_worker_is_the_end_of_the_wait():
    local = [S.RECEIVED, S.ROUTED, S.QUEUED, S.PREFILLING, S.DECODING, S.FINISHED]
    told = moves(local, 0, 1, 1, 9, 9, 15)
    assert phases(told, 3.0) == [Phase("queue", 1, 6), Phase("prefill", 6, 9), Phase("decode", 9, 15)]
    assert phases(told, 100.0) == [Phase("prefill", 1, 9), Phase("decode", 9, 15)]
    assert phases(told, 0.0) == [Phase("queue", 1, 9), Phase("decode", 9, 15)]


def test_what_was_tried_twice_is_there_twice():
    twice = [S.RECEIVED, S.ROUTED, S.QUEUED, S.PREFILLING, S.DECODING, S.ROUTED, S.QUEUED, S.FAILED]
    names = [(p.name, p.began, p.ended) for p in phases(moves(twice, 0, 1, 2, 3, 4, 5, 6, 9), 0.0)]
    assert names == [("queue", 2, 3), ("prefill", 3, 4), ("decode", 4, 5), ("queue", 6, 9)]


def test_a_request_that_was_never_routed_has_no_phases():
    assert phases(moves([S.RECEIVED, S.FAILED], 0, 1), 0.0) == []


# -- spans ------------------------------------------------------------------------------------------------------------


def test_a_request_is_a_span_with_a_child_for_each_phase_at_its_real_times(traced):
    tracer, exporter = traced
    span = tracer.begin("", "", 100.0)
    times = (100.0, 100.5, 100.5, 101.0, 102.0, 104.0, 108.0)
    span.end(moves(PAIR, *times), 1.0, {"tailrace.request_id": "r", "gen_ai.response.finish_reasons": ["stop"]})
    *children, root = exporter.get_finished_spans()
    assert (root.name, root.kind, root.parent) == ("request", SpanKind.SERVER, None)
    assert root.attributes["tailrace.request_id"] == "r"
    assert root.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert root.status.status_code is StatusCode.UNSET
    assert root.resource.attributes["service.name"] == "tailrace-gateway"
    assert [child.name for child in children] == ["queue", "prefill", "transfer", "decode"]
    assert {child.parent.span_id for child in children} == {root.context.span_id}
    assert {child.context.trace_id for child in children} == {root.context.trace_id}
    seconds = [((c.start_time - root.start_time) / 1e9, (c.end_time - root.start_time) / 1e9) for c in children]
    expected = [(0.5, 1.0), (1.0, 2.0), (2.0, 4.0), (4.0, 8.0)]
    assert list(itertools.chain(*seconds)) == pytest.approx(list(itertools.chain(*expected)), abs=1e-6)
    assert (root.end_time - root.start_time) / 1e9 == pytest.approx(8.0, abs=1e-6)


def test_an_incoming_trace_goes_on_below_it_and_on_to_the_workers(traced):
    tracer, exporter = traced
    span = tracer.begin(PARENT, "vendor=x", 100.0)
    span.end(moves([S.RECEIVED, S.FAILED], 100.0, 101.0), 0.0, {}, error="no worker")
    (root,) = exporter.get_finished_spans()
    _, trace_id, parent_id, _ = PARENT.split("-")
    assert f"{root.context.trace_id:032x}" == trace_id
    assert f"{root.parent.span_id:016x}" == parent_id
    assert span.context.traceparent == f"00-{trace_id}-{root.context.span_id:016x}-01"
    assert span.context.tracestate == "vendor=x"
    assert (root.status.status_code, root.status.description) == (StatusCode.ERROR, "no worker")


def test_a_trace_that_its_beginner_did_not_sample_is_passed_on_and_not_recorded(traced):
    tracer, exporter = traced
    span = tracer.begin(PARENT[:-2] + "00", "", 100.0)
    assert span.context.traceparent.startswith(PARENT[:36])
    assert span.context.traceparent.endswith("-00")
    span.end(moves(PAIR, *range(7)), 0.0, {})
    assert exporter.get_finished_spans() == ()


@pytest.mark.parametrize("garbage", ["", "nonsense", "00-0-0-01", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_a_traceparent_that_is_none_begins_a_new_trace(traced, garbage):
    tracer, exporter = traced
    span = tracer.begin(garbage, "a=b", 100.0)
    span.end(moves([S.RECEIVED, S.CANCELLED], 100.0, 101.0), 0.0, {})
    (root,) = exporter.get_finished_spans()
    assert root.parent is None
    assert span.context.traceparent.split("-")[1] == f"{root.context.trace_id:032x}"


def test_with_the_sdk_switched_off_the_callers_trace_still_reaches_the_workers(monkeypatch):
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    tracer = RequestTracer(SimpleSpanProcessor(InMemorySpanExporter()))
    assert tracer.begin("", "", 100.0).context.traceparent == ""
    assert tracer.begin(PARENT, "", 100.0).context.traceparent == PARENT


def test_the_service_may_be_called_otherwise(monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "llm-east")
    exporter = InMemorySpanExporter()
    tracer = RequestTracer(SimpleSpanProcessor(exporter))
    tracer.begin("", "", 1.0).end(moves([S.RECEIVED, S.CANCELLED], 1.0, 2.0), 0.0, {})
    assert exporter.get_finished_spans()[0].resource.attributes["service.name"] == "llm-east"


# -- who asks for spans -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "protocol"),
    [
        ({}, ""),
        ({"OTEL_SERVICE_NAME": "x"}, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317"}, "grpc"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4317"}, "grpc"),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "grpc"),
        ({"OTEL_TRACES_EXPORTER": "console, otlp"}, "grpc"),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317"}, ""),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317"}, ""),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "http/protobuf"),
    ],
)
def test_opentelemetrys_own_variables_say_whether_spans_are_wanted(monkeypatch, variables, protocol):
    for name in ("OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert otlp_protocol() == protocol


def test_a_protocol_that_nobody_knows_is_refused():
    with pytest.raises(ConfigError, match=r"OTEL_EXPORTER_OTLP_PROTOCOL: must be one of .*, got 'carrier pigeon'"):
        otlp_tracer("carrier pigeon")


def test_an_exporter_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: ())
    with pytest.raises(ConfigError, match="opentelemetry-exporter-otlp-proto-grpc"):
        otlp_tracer("grpc")


def test_spans_leave_through_the_exporter_that_the_protocol_names(monkeypatch):
    exporter = InMemorySpanExporter()

    class EntryPoint:
        def load(self):
            return lambda: exporter

    asked = []
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **what: [asked.append(what), EntryPoint()][1:])
    tracer = otlp_tracer("http/protobuf")
    tracer.begin("", "", 1.0).end(moves([S.RECEIVED, S.CANCELLED], 1.0, 2.0), 0.0, {})
    sent = []
    monkeypatch.setattr(exporter, "shutdown", lambda: sent.extend(exporter.get_finished_spans()))
    tracer.close()
    assert [span.name for span in sent] == ["request"], "the end of the process sends what is left"
    assert asked == [{"group": "opentelemetry_traces_exporter", "name": "otlp_proto_http"}]


def test_a_gateway_without_tracing_does_not_even_load_the_sdk():
    """Neither time nor memory: a process of its own, because this one has it loaded."""
    code = (
        "import sys, services.gateway.main, services.gateway.observer as o;"
        "assert o.open_tracer() is None; print('opentelemetry.sdk' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={})
    assert answer.stdout.strip() == "False"

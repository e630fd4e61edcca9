"""Spans of a request, made at its end from the moves of its Lifecycle: nothing is traced while tokens flow.

Needs the extra `tailrace[otlp]`; import it only where spans are wanted. Where they go, how many are sampled and what
the service is called say OpenTelemetry's own variables (`OTEL_*`), which its SDK reads.
"""

import importlib.metadata
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tailrace import __version__
from tailrace.errors import ConfigError
from tailrace.lifecycle import RequestState

_PROPAGATOR = TraceContextTextMapPropagator()
_DEFAULT_SERVICE = "tailrace-gateway"
_EXPORTERS = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}
"""Entry points of OpenTelemetry's exporters, by the names of OTEL_EXPORTER_OTLP_PROTOCOL."""
_PHASES = {
    RequestState.QUEUED: "queue",
    RequestState.PREFILLING: "prefill",
    RequestState.TRANSFERRING: "transfer",
    RequestState.DECODING: "decode",
}
Moves = Sequence[tuple[RequestState, float]]
"""States and when they began, in monotonic seconds; the last one is an end."""
Attributes = Mapping[str, str | int | float | Sequence[str]]


@dataclass(frozen=True, slots=True)
class TraceContext:
    """W3C Trace Context; empty: none."""

    traceparent: str = ""
    tracestate: str = ""


@dataclass(frozen=True, slots=True)
class Phase:
    name: str
    began: float
    ended: float


class RequestTracer:
    """Makes one span a request, with a child for each phase."""

    def __init__(self, processor: SpanProcessor) -> None:
        self._provider = TracerProvider(resource=_resource())
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("tailrace", __version__)

    def begin(self, traceparent: str, tracestate: str, began: float) -> "RequestSpan":
        """Below the caller's span, if it named one. `began`: monotonic seconds."""
        return RequestSpan(self._tracer, TraceContext(traceparent, tracestate), began)

    def close(self) -> None:
        """Sends what is left; may block for seconds."""
        self._provider.shutdown()


class RequestSpan:
    def __init__(self, tracer: Tracer, parent: TraceContext, began: float) -> None:
        self._tracer = tracer
        # One offset a request: its spans keep their order whatever happens to the clock of the wall.
        self._offset_ns = time.time_ns() - time.monotonic_ns()
        self._span = tracer.start_span(
            "request", context=_extract(parent), kind=SpanKind.SERVER, start_time=self._wall_ns(began)
        )
        self.context = _inject(self._span) or parent
        """What goes to the workers: this span, as their parent."""

    def end(self, moves: Moves, prefill_s: float, attributes: Attributes, *, error: str = "") -> None:
        """`prefill_s`: as reported by who prefilled. `error`: what the client was told, where the request failed."""
        if self._span.is_recording():
            self._span.set_attributes(attributes)
            if error:
                self._span.set_status(StatusCode.ERROR, error)
            self._add_phases(phases(moves, prefill_s), set_span_in_context(self._span))
        self._span.end(self._wall_ns(moves[-1][1]))

    def _add_phases(self, parts: Sequence[Phase], context: Context) -> None:
        for phase in parts:
            child = self._tracer.start_span(phase.name, context=context, start_time=self._wall_ns(phase.began))
            child.end(self._wall_ns(phase.ended))

    def _wall_ns(self, monotonic_s: float) -> int:
        return self._offset_ns + round(monotonic_s * 1e9)


def phases(moves: Moves, prefill_s: float) -> list[Phase]:
    """How long each state lasted, without those that took no time; one tried twice is there twice.

    A prefill of which nothing was heard while it ran (a decode worker's own) is the end of the wait before it.
    """
    found: list[Phase] = []
    for (state, began), (_, ended) in itertools.pairwise(moves):
        name = _PHASES.get(state)
        if state is RequestState.PREFILLING and began == ended and found:
            queue = found.pop()
            began = max(queue.began, ended - prefill_s)
            found.append(Phase(queue.name, queue.began, began))
        if name is not None:
            found.append(Phase(name, began, ended))
    return [phase for phase in found if phase.ended > phase.began]


def otlp_tracer(protocol: str) -> RequestTracer:
    """Sends spans in batches, from a thread of its own. Raises ConfigError when the exporter is not there."""
    if protocol not in _EXPORTERS:
        known = ", ".join(_EXPORTERS)
        raise ConfigError(f"OTEL_EXPORTER_OTLP_PROTOCOL: must be one of {known}, got {protocol!r}")
    name = _EXPORTERS[protocol]
    found = importlib.metadata.entry_points(group="opentelemetry_traces_exporter", name=name)
    if not found:
        raise ConfigError(f"spans over {protocol} need the package opentelemetry-exporter-{name.replace('_', '-')}")
    exporter = next(iter(found)).load()
    return RequestTracer(BatchSpanProcessor(exporter()))


def _resource() -> Resource:
    resource = Resource.create()
    if str(resource.attributes.get(SERVICE_NAME, "unknown_service")).startswith("unknown_service"):
        return resource.merge(Resource({SERVICE_NAME: _DEFAULT_SERVICE}))
    return resource


def _extract(parent: TraceContext) -> Context:
    """A traceparent that is no traceparent begins a new trace."""
    carrier = {"traceparent": parent.traceparent, "tracestate": parent.tracestate}
    return _PROPAGATOR.extract({name: value for name, value in carrier.items() if value}, Context())


def _inject(span: Span) -> TraceContext | None:
    """None where the SDK is switched off (OTEL_SDK_DISABLED)."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, set_span_in_context(span))
    if "traceparent" not in carrier:
        return None
    return TraceContext(carrier["traceparent"], carrier.get("tracestate", ""))

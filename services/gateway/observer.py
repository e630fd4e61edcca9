"""Who watches requests begin and end: the metrics and, where spans are wanted, the tracer."""

import asyncio
import logging
from typing import TYPE_CHECKING

from services.gateway.generation import Usage
from services.gateway.session import RequestSession
from tailrace.config import otlp_protocol
from tailrace.errors import ConfigError
from tailrace.telemetry.metrics import GatewayMetrics
from tailrace.types import Role

if TYPE_CHECKING:
    # The SDK is optional, and slow to import.
    from tailrace.telemetry.trace import RequestSpan, RequestTracer

log = logging.getLogger(__name__)


def open_tracer() -> "RequestTracer | None":
    """None unless OpenTelemetry's variables ask for spans; if they do and cannot be served, the log says why."""
    if not (protocol := otlp_protocol()):
        return None
    try:
        from tailrace.telemetry.trace import otlp_tracer

        return otlp_tracer(protocol)
    except ImportError:
        log.warning("no spans are sent: they need the extra tailrace[otlp]")
    except ConfigError as error:
        log.warning("no spans are sent: %s", error.message)
    return None


class Observer:
    """`model`: its name in spans. Event loop only."""

    def __init__(self, metrics: GatewayMetrics, tracer: "RequestTracer | None", model: str) -> None:
        self._metrics = metrics
        self._tracer = tracer
        self._model = model
        self._spans: dict[RequestSession, RequestSpan] = {}

    def begun(self, session: RequestSession) -> None:
        """The workers get this gateway's span as their parent."""
        if self._tracer is None:
            return
        span = self._tracer.begin(session.traceparent, session.tracestate, session.began)
        session.traceparent, session.tracestate = span.context.traceparent, span.context.tracestate
        self._spans[session] = span

    def ended(self, session: RequestSession) -> None:
        assert session.usage is not None
        for tier, num_tokens in session.usage.cached_by_tier.items():
            self._metrics.cached(num_tokens, tier=tier)
        if (span := self._spans.pop(session, None)) is not None:
            error = session.error.message if session.error is not None else ""
            span.end(session.life.moves, session.usage.prefill_s, self._attributes(session, session.usage), error=error)

    def _attributes(self, session: RequestSession, usage: Usage) -> dict[str, str | int | float | list[str]]:
        """Names follow OpenTelemetry's conventions for generative AI where they have one."""
        attributes: dict[str, str | int | float | list[str]] = {
            "gen_ai.request.model": self._model,
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.output_tokens": usage.completion_tokens,
            "gen_ai.response.finish_reasons": [reason.openai for reason in session.finish_reasons],
            "tailrace.request_id": session.request.request_id,
            "tailrace.outcome": str(session.life.state),
            "tailrace.num_attempts": session.num_attempts,
            "tailrace.cached_tokens": usage.cached_tokens,
            "tailrace.transport": usage.transport,
            "tailrace.transfer_bytes": usage.transfer_bytes,
            "tailrace.prefill_workers": session.workers[Role.PREFILL],
            "tailrace.decode_workers": session.workers[Role.DECODE],
        }
        if usage.completion_tokens:
            attributes["tailrace.ttft_s"] = usage.ttft_s
        if session.error is not None:
            attributes["error.type"] = session.error.code.name.lower()
        return attributes

    async def close(self) -> None:
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)

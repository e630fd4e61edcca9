"""The HTTP surface of the gateway: OpenAI's API, and what operators ask for."""

import dataclasses
import json
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from services.gateway.edge import Edge
from services.gateway.generate import Endpoints, HttpOptions, no_such_model
from services.gateway.generation import Dispatcher
from services.gateway.http_errors import answer_error, answer_http_exception
from services.gateway.http_metrics import HttpMetrics
from services.gateway.outlet import Desk, StepWriter
from services.gateway.prepare import ServedModel
from tailrace import __version__
from tailrace.errors import TailraceError
from tailrace.kv.layout import KVLayout


@dataclass(frozen=True, slots=True)
class Readiness:
    reasons: tuple[str, ...] = ()
    """Why no request can be served now; empty when one can."""
    degraded: tuple[str, ...] = ()
    """What is wrong, though requests are served."""
    retry_after_s: int = 1


@dataclass(frozen=True, slots=True)
class Views:
    """What operators may look at, kept by other rooms."""

    ready: Callable[[], Readiness]
    metrics: Callable[[], bytes]
    """More Prometheus text, put after the edge's own."""
    debug_kv: Callable[[], Awaitable[object]]
    """Anything that JSON can say; dataclasses are objects."""
    layouts: Callable[[], Collection[KVLayout]]
    """Of the decode workers that are attached."""


def create_app(
    *,
    dispatcher: Dispatcher,
    model: ServedModel,
    options: HttpOptions,
    views: Views,
    step_writer: StepWriter | None = None,
) -> FastAPI:
    """Raises nothing; opens nothing. Whoever runs the app closes what is behind the dispatcher.

    step_writer: None: streams have no short way.
    """
    metrics = HttpMetrics()
    desk = Desk(step_writer, model.tokenizer.vocabulary, metrics.icl) if step_writer is not None else None
    app = FastAPI(title="Tailrace", version=__version__, openapi_url=None, redirect_slashes=False)
    app.add_middleware(Edge, api_keys=options.api_keys, metrics=metrics)
    app.add_exception_handler(TailraceError, answer_error)
    app.add_exception_handler(HTTPException, answer_http_exception)
    endpoints = Endpoints(dispatcher, model, options, metrics, desk)
    app.include_router(_openai_routes(endpoints, model, views))
    app.include_router(_operator_routes(endpoints, views, metrics))
    return app


def _json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(value, default=_plain), status, headers, "application/json")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _openai_routes(endpoints: Endpoints, model: ServedModel, views: Views) -> APIRouter:
    router = APIRouter(prefix="/v1")
    router.add_api_route("/completions", endpoints.completions, methods=["POST"])
    router.add_api_route("/chat/completions", endpoints.chat, methods=["POST"])

    @router.get("/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [_describe(name, model, views.layouts()) for name in model.names]})

    @router.get("/models/{name:path}")
    async def one_model(name: str) -> Response:
        if name not in model.names:
            raise no_such_model(name, model)
        return _json(_describe(name, model, views.layouts()))

    return router


def _describe(name: str, model: ServedModel, layouts: Collection[KVLayout]) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "tailrace",
        "root": model.names[0],
        "parent": None,
        "max_model_len": model.max_model_len,
        "dtype": _distinct(layout.kv_dtype for layout in layouts),
        "quantization": _distinct(layout.quantization for layout in layouts),
    }


def _distinct(values: Iterable[str]) -> str | None:
    """None while no worker is there; "int8, none" where they disagree."""
    return ", ".join(sorted(set(values))) or None


def _operator_routes(endpoints: Endpoints, views: Views, metrics: HttpMetrics) -> APIRouter:
    router = APIRouter()
    router.add_api_route("/debug/route", endpoints.route, methods=["POST"])

    @router.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        return _json({"status": "ok"})

    @router.api_route("/ready", methods=["GET", "HEAD"])
    async def ready() -> Response:
        readiness = views.ready()
        if readiness.reasons:
            answer = {"status": "unready", "reasons": list(readiness.reasons)}
            return _json(answer, 503, {"Retry-After": str(readiness.retry_after_s)})
        status = "degraded" if readiness.degraded else "ready"
        return _json({"status": status, "reasons": list(readiness.degraded)})

    @router.get("/version")
    async def version() -> Response:
        return _json({"version": __version__})

    @router.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text() + views.metrics(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @router.get("/debug/kv")
    async def debug_kv() -> Response:
        return _json(await views.debug_kv())

    return router

"""The gRPC servers of the cluster: authentication, error mapping, and the servicers that workers share."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, Protocol, TypeAlias

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tailrace.errors import ConfigError, ErrorCode, InvalidRequestError, LayoutMismatchError, TailraceError
from tailrace.kv.layout import KVLayout
from tailrace.messages import KvEventBatch, LedgerReport, LendDone, LendTerms, LentBlocks, Load
from tailrace.rpc import convert
from tailrace.rpc.auth import AUTH_HEADER, control_token, is_control_token
from tailrace.rpc.gen import control_pb2, control_pb2_grpc, kv_pb2, kv_pb2_grpc, worker_pb2, worker_pb2_grpc
from tailrace.rpc.options import PEER_LOSS_S, SERVER_OPTIONS
from tailrace.rpc.step_line import LineWriter, StepLines
from tailrace.transfer.endpoints import PeerEndpoints
from tailrace.worker.attach import Attachments, Session

log = logging.getLogger(__name__)

_CODES: dict[ErrorCode, grpc.StatusCode] = {
    ErrorCode.INVALID_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorCode.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    ErrorCode.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ErrorCode.OVERLOADED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorCode.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    ErrorCode.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    ErrorCode.CANCELLED: grpc.StatusCode.CANCELLED,
    ErrorCode.WORKER_LOST: grpc.StatusCode.UNAVAILABLE,
    ErrorCode.TRANSFER_FAILED: grpc.StatusCode.UNAVAILABLE,
    ErrorCode.LAYOUT_MISMATCH: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorCode.INTERNAL: grpc.StatusCode.INTERNAL,
}
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


async def abort(context: Context, error: TailraceError) -> NoReturn:
    """A failure before acceptance is a gRPC status."""
    await context.abort(_CODES[error.code], error.message)


class ControlAuth(grpc.aio.ServerInterceptor):
    """Calls to `tailrace.v1` services need the cluster's control token; `public` ones look after themselves."""

    def __init__(self, secret: bytes, *, public: tuple[str, ...] = ()) -> None:
        self._token = control_token(secret)
        self._public = tuple(f"/{name}/" for name in ("grpc.health.v1.Health", *public))

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(self._public):
            return handler
        presented = next((v for k, v in handler_call_details.invocation_metadata if k == AUTH_HEADER), "")
        if isinstance(presented, str) and is_control_token(self._token, presented):
            return handler
        log.warning("refused a call to %s: wrong or no cluster secret", handler_call_details.method)
        return _refusing(handler)


def _refusing(handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
    """The same kind of method, which answers UNAUTHENTICATED."""

    async def refuse(_request: object, context: Context) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong or no cluster secret (TAILRACE_SECRET)")

    kinds = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make = kinds[handler.request_streaming, handler.response_streaming]
    return make(refuse, handler.request_deserializer, handler.response_serializer)


class Server:
    """A gRPC server with health service. `port` is known once it has started."""

    def __init__(self, secret: bytes, *, public: tuple[str, ...] = ()) -> None:
        self.grpc = grpc.aio.server(options=SERVER_OPTIONS, interceptors=[ControlAuth(secret, public=public)])
        self.health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.grpc)
        self.lines = StepLines()
        self.port = 0
        self._host = ""

    def bind(self, host: str, port: int) -> int:
        """Raises ConfigError when the port is in use."""
        self._host = host
        name = f"[{host}]" if ":" in host and not host.startswith("[") else host
        try:
            self.port = self.grpc.add_insecure_port(f"{name}:{port}")
        except RuntimeError:
            raise ConfigError(f"port: cannot listen on {name}:{port}; is it in use?", param="port") from None
        return self.port

    async def start(self) -> None:
        await self.grpc.start()
        if self.lines.are_wanted:
            await self.lines.start(self._host)
        await self.health.set("", health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace_s: float = 0.0) -> None:
        await self.health.enter_graceful_shutdown()
        await self.grpc.stop(grace_s)
        self.lines.stop()


# -- servicers that prefill and decode share --------------------------------------------------------------------------


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """`Attach`: commands of one gateway in, one message a step out."""

    def __init__(self, attachments: Callable[[], Attachments], lines: StepLines | None = None) -> None:
        """`attachments` raises TailraceError while nobody can attach. Without `lines` everything is said over gRPC."""
        self._attachments = attachments
        self._lines = lines or StepLines()

    # A coroutine that writes, which the stubs do not know: a write that is cut still ends with everything closed.
    async def Attach(  # type: ignore[override]
        self, request_iterator: AsyncIterator[worker_pb2.AttachRequest], context: Context
    ) -> None:
        session = await self._greet(request_iterator, context)
        reader = asyncio.create_task(self._read(session, request_iterator))
        try:
            with self._lines.offer() as line:
                async with contextlib.aclosing(session.events()) as events:
                    async for event in events:
                        await self._write(session, convert.step_events_to_proto(event), context, line)
        finally:
            reader.cancel()
            self._attachments().close(session)

    async def _write(
        self, session: Session, message: worker_pb2.AttachResponse, context: Context, line: LineWriter
    ) -> None:
        """A gateway that does not read loses its session: what it submitted is cancelled.

        A write over gRPC is left alone: it cannot end a call whose write was cancelled. It ends with the connection.
        """
        if line.is_open:
            if not await line.send(message, PEER_LOSS_S):
                self._attachments().close(session)
            return
        line.announce(message)
        write = asyncio.ensure_future(context.write(message))
        done, _ = await asyncio.wait({write}, timeout=PEER_LOSS_S)
        if not done:
            log.warning("gateway %s does not read; its session is closed", session.gateway_id)
            self._attachments().close(session)
        await write

    async def _greet(self, requests: AsyncIterator[worker_pb2.AttachRequest], context: Context) -> Session:
        first = await anext(aiter(requests), None)
        if first is None or not first.HasField("greeting"):
            await abort(context, InvalidRequestError("the first command must be a greeting", param="greeting"))
        try:
            return self._attachments().open(first.greeting.gateway_id, first.greeting.gateway_epoch)
        except TailraceError as error:
            await abort(context, error)

    async def _read(self, session: Session, requests: AsyncIterator[worker_pb2.AttachRequest]) -> None:
        """Ends the session when the gateway ends its side."""
        try:
            async for request in requests:
                self._apply(session, request)
        finally:
            session.close()

    def _apply(self, session: Session, request: worker_pb2.AttachRequest) -> None:
        if request.HasField("submit"):
            try:
                self._attachments().submit(session, convert.submission_from_proto(request.submit))
            except TailraceError as error:
                session.add_failure(request.submit.handle, error)
        elif request.HasField("cancel"):
            self._attachments().cancel(session, request.cancel.handle, tuple(request.cancel.choices))


class Owning(Protocol):
    """What an owner of KV answers, whatever its role."""

    @property
    def layout(self) -> KVLayout: ...

    def meet(self, needer_id: str, needer_epoch: int) -> PeerEndpoints: ...

    def lend(self, terms: LendTerms) -> AsyncGenerator[LentBlocks | LendDone, None]: ...


class KvOwnerServicer(kv_pb2_grpc.KvOwnerServiceServicer):
    def __init__(self, owner: Owning) -> None:
        self._owner = owner

    async def Meet(self, request: kv_pb2.MeetRequest, context: Context) -> kv_pb2.MeetResponse:
        try:
            needer = convert.layout_from_proto(request.layout)
            if differences := self._owner.layout.differences(needer):
                raise LayoutMismatchError("; ".join(differences))
            return convert.endpoints_to_proto(self._owner.meet(request.worker_id, request.epoch), self._owner.layout)
        except TailraceError as error:
            await abort(context, error)

    # A coroutine, as Attach: gRPC would leave a generator to the garbage collector, and its blocks lent until then.
    async def Lend(self, request: kv_pb2.LendRequest, context: Context) -> None:  # type: ignore[override]
        try:
            async with contextlib.aclosing(self._owner.lend(convert.terms_from_proto(request))) as events:
                async for event in events:
                    await context.write(_LENT[type(event)](event))
        except TailraceError as error:
            await abort(context, error)


_LENT: dict[type, Callable[[Any], kv_pb2.LendResponse]] = {
    LentBlocks: convert.lent_to_proto,
    LendDone: convert.done_to_proto,
}


class Controlled(Protocol):
    """What can be asked of a worker beside its work."""

    def drain(self) -> None: ...

    def load(self) -> Load: ...

    async def ledger(self) -> LedgerReport: ...

    def snapshot(self) -> AsyncIterator[KvEventBatch]: ...


class ControlServicer(control_pb2_grpc.ControlServiceServicer):
    def __init__(self, worker: Controlled) -> None:
        self._worker = worker

    async def Drain(self, request: control_pb2.DrainRequest, context: Context) -> control_pb2.DrainResponse:
        self._worker.drain()
        return control_pb2.DrainResponse()

    async def GetLoad(self, request: control_pb2.GetLoadRequest, context: Context) -> control_pb2.GetLoadResponse:
        return control_pb2.GetLoadResponse(load=convert.load_to_proto(self._worker.load()))

    async def GetLedger(self, request: control_pb2.GetLedgerRequest, context: Context) -> control_pb2.GetLedgerResponse:
        return control_pb2.GetLedgerResponse(ledger=convert.ledger_to_proto(await self._worker.ledger()))

    async def Snapshot(
        self, request: control_pb2.SnapshotRequest, context: Context
    ) -> AsyncIterator[control_pb2.SnapshotResponse]:
        async for batch in self._worker.snapshot():
            yield control_pb2.SnapshotResponse(events=convert.kv_events_to_proto(batch))


def add_worker(server: Server, attachments: Callable[[], Attachments], worker: Controlled) -> None:
    """What every member answers, whether it computes or only keeps."""
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerServicer(attachments, server.lines), server.grpc)
    server.lines.are_wanted = True
    control_pb2_grpc.add_ControlServiceServicer_to_server(ControlServicer(worker), server.grpc)

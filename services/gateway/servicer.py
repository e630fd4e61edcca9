"""The gateway's gRPC services: `Inference.Generate` for clients, `Membership.Join` for workers."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from services.gateway.inference import EventStream, Inference
from services.gateway.members import Members
from tailrace.errors import CancelledByClientError, InvalidRequestError, TailraceError
from tailrace.rpc.convert_inference import error_to_trailer, event_to_proto, request_from_proto
from tailrace.rpc.gen import control_pb2, control_pb2_grpc, generation_pb2, generation_pb2_grpc
from tailrace.rpc.server import Context, Server, abort

PUBLIC_SERVICES = ("tailrace.v1.InferenceService",)
"""Services that check API keys themselves, rather than the cluster's secret."""


def add_to(server: Server, *, members: Members, inference: Inference) -> None:
    """The server must have been made with PUBLIC_SERVICES, and not started yet."""
    control_pb2_grpc.add_MembershipServiceServicer_to_server(MembershipServicer(members), server.grpc)
    generation_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(inference), server.grpc)


class InferenceServicer(generation_pb2_grpc.InferenceServiceServicer):
    def __init__(self, inference: Inference) -> None:
        self._inference = inference

    async def Generate(  # type: ignore[override]  # a coroutine that writes, which the stubs do not know
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> None:
        """A refusal is a status, with the Error in the trailing metadata; once accepted, an Error is the last event."""
        try:
            self._check_size(request)
            events = await self._inference.accept(lambda: request_from_proto(request), _authorization(context))
        except TailraceError as error:
            context.set_trailing_metadata((error_to_trailer(error),))
            await abort(context, error)
        async with contextlib.aclosing(events):
            await self._write(events, context)

    def _check_size(self, request: generation_pb2.GenerateRequest) -> None:
        size, limit = request.ByteSize(), self._inference.options.max_request_bytes
        if size > limit:
            raise InvalidRequestError(f"the request has {size} bytes; at most {limit} are read", param="prompt")

    async def _write(self, events: EventStream, context: Context) -> None:
        """A write is never cancelled: gRPC could not end such a call any more. A client that does not read is cut
        behind the write, and finds the error when it reads again.
        """
        patience_s = self._inference.options.slow_client_s
        error = CancelledByClientError(f"the client read nothing for {patience_s:g} s; the request was cancelled")
        async for event in events:
            timer = asyncio.get_running_loop().call_later(patience_s, events.cut, error)
            try:
                await context.write(event_to_proto(event))
            finally:
                timer.cancel()


def _authorization(context: Context) -> str:
    values = (value for key, value in context.invocation_metadata() or () if key == "authorization")
    value = next(values, "")
    return value if isinstance(value, str) else ""


class MembershipServicer(control_pb2_grpc.MembershipServiceServicer):
    """A worker is a member for as long as it keeps the stream open."""

    def __init__(self, members: Members) -> None:
        self._members = members

    async def Join(
        self, request_iterator: AsyncIterator[control_pb2.JoinRequest], context: Context
    ) -> AsyncIterator[control_pb2.JoinResponse]:
        request = await anext(aiter(request_iterator), None)
        if request is None or ":" not in request.address:
            await abort(context, InvalidRequestError("address: host:port is needed", param="address"))
        self._members.add(request.address)
        try:
            yield control_pb2.JoinResponse(gateway_id=self._members.gateway_id)
            async for _ in request_iterator:
                pass
        finally:
            self._members.remove(request.address)

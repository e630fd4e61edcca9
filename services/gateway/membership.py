"""`Membership.Join`: a worker is a member for as long as it keeps the stream open."""

import logging
from collections.abc import AsyncIterator

from services.gateway.members import Members
from tailrace.errors import InvalidRequestError
from tailrace.rpc.gen import control_pb2, control_pb2_grpc
from tailrace.rpc.server import Context, abort

log = logging.getLogger(__name__)


class MembershipServicer(control_pb2_grpc.MembershipServiceServicer):
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

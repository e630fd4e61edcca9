"""Offers, pins and quotas on the wire."""

from services.kvstore import control
from services.kvstore.node import StoreNode
from tailrace.errors import TailraceError
from tailrace.rpc import convert
from tailrace.rpc.gen import kv_pb2, kv_pb2_grpc
from tailrace.rpc.server import Context, KvOwnerServicer, Server, abort, add_worker


class KvStoreServicer(kv_pb2_grpc.KvStoreServiceServicer):
    def __init__(self, node: StoreNode) -> None:
        self._node = node

    async def Offer(self, request: kv_pb2.OfferRequest, context: Context) -> kv_pb2.OfferResponse:
        try:
            return kv_pb2.OfferResponse(wanted=await self._node.offer(convert.offer_from_proto(request)))
        except TailraceError as error:
            await abort(context, error)

    async def Pin(self, request: kv_pb2.PinRequest, context: Context) -> kv_pb2.PinResponse:
        try:
            hashes, storage = convert.pin_from_proto(request), self._node.ready()
            number = control.pin(storage, request.owner, hashes)
            return kv_pb2.PinResponse(num_pinned=number, limit=storage.store.pins.limit)
        except TailraceError as error:
            await abort(context, error)

    async def Unpin(self, request: kv_pb2.UnpinRequest, context: Context) -> kv_pb2.UnpinResponse:
        try:
            hashes = convert.pin_from_proto(request)
            number = self._node.ready().store.unpin(hashes or None, request.owner)
            return kv_pb2.UnpinResponse(num_unpinned=number)
        except TailraceError as error:
            await abort(context, error)

    async def SetQuota(self, request: kv_pb2.SetQuotaRequest, context: Context) -> kv_pb2.SetQuotaResponse:
        try:
            convert.check_quota(request)
            memory = request.memory_bytes if request.HasField("memory_bytes") else None
            disk = request.disk_bytes if request.HasField("disk_bytes") else None
            control.set_quota(self._node.ready(), request.tenant, memory, disk)
            return kv_pb2.SetQuotaResponse()
        except TailraceError as error:
            await abort(context, error)

    async def GetUsage(self, request: kv_pb2.GetUsageRequest, context: Context) -> kv_pb2.GetUsageResponse:
        try:
            return convert.usage_to_proto(control.usage(self._node.ready()))
        except TailraceError as error:
            await abort(context, error)


def add_store(server: Server, node: StoreNode) -> None:
    """All that a store answers."""
    kv_pb2_grpc.add_KvStoreServiceServicer_to_server(KvStoreServicer(node), server.grpc)
    kv_pb2_grpc.add_KvOwnerServiceServicer_to_server(KvOwnerServicer(node), server.grpc)
    add_worker(server, lambda: node.membership.attachments, node)

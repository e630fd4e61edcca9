"""`Offer` on the wire."""

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


def add_store(server: Server, node: StoreNode) -> None:
    """All that a store answers."""
    kv_pb2_grpc.add_KvStoreServiceServicer_to_server(KvStoreServicer(node), server.grpc)
    kv_pb2_grpc.add_KvOwnerServiceServicer_to_server(KvOwnerServicer(node), server.grpc)
    add_worker(server, lambda: node.membership.attachments, node)

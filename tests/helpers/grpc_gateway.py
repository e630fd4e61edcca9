"""The gateway's gRPC edge over a fake dispatcher, on a free loopback port."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.gateway.generation import Dispatcher
from services.gateway.inference import Inference, InferenceOptions
from services.gateway.members import Members
from services.gateway.servicer import PUBLIC_SERVICES, add_to
from tailrace.rpc.server import Server
from tests.helpers.gateway_app import served_model
from tests.helpers.index import compact_index

SECRET = b"0123456789abcdef"


@asynccontextmanager
async def grpc_gateway(dispatcher: Dispatcher, options: InferenceOptions | None = None) -> AsyncIterator[str]:
    """The address, host:port."""
    server = Server(SECRET, public=PUBLIC_SERVICES)
    members = Members(gateway_id="gateway", epoch=1, secret=SECRET, index=compact_index())
    add_to(server, members=members, inference=Inference(dispatcher, served_model(), options or InferenceOptions()))
    server.bind("127.0.0.1", 0)
    await server.start()
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        await server.stop()
        await members.close()

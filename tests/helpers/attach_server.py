"""A process with nothing but an `Attach` server: `python -m tests.helpers.attach_server`. Prints its port."""

import asyncio

from tailrace.rpc.gen import worker_pb2_grpc
from tailrace.rpc.server import Server, WorkerServicer
from tailrace.worker.attach import Attachments, Leg
from tests.helpers.values import SECRET, make_info


class Deaf:
    """Accepts everything and does nothing."""

    def begin(self, leg: Leg) -> None:
        pass

    def cancel(self, leg: Leg, choices: tuple[int, ...]) -> None:
        pass


async def main() -> None:
    server = Server(SECRET)
    attachments = Attachments(make_info(), Deaf(), steps=lambda: 0)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerServicer(lambda: attachments), server.grpc)
    port = server.bind("127.0.0.1", 0)
    await server.start()
    print(port, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())

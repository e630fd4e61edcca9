"""A real Redis behind a slow link: hits get old, and no request waits for it."""

import asyncio
import time

from tailrace.policy.router import Router
from tailrace.policy.routing import RouteRequest, WorkerView
from tailrace.types import Role
from tests.helpers.redis_servers import RedisServer
from tests.helpers.redis_workers import TIMEOUT_S, PlayedGateway, PlayedWorker, running
from tests.helpers.slow_link import SlowLink
from tests.helpers.waiting import until
from tests.unit.index.test_mirror import knows, says, well
from tests.unit.index.test_redis import hashes_of

SLOW_S = 0.25 * TIMEOUT_S
"""An answer is in time, also after a read of a stream has waited for news."""
TOO_SLOW_S = 2.0 * TIMEOUT_S
PREFILLS = [WorkerView(f"w{n}", Role.PREFILL, b"", prefill_tokens_per_s=1000.0) for n in range(2)]
DECODES = [WorkerView("d0", Role.DECODE, b"", decode_step_s=0.01, max_num_seqs=1000)]


async def hit_of_decisions(gateway: PlayedGateway, seconds: float) -> int:
    """Of the worker that has the prompt, in decisions made for so long, none of which takes a tenth of an answer."""
    router, hashes = Router(gateway.index), hashes_of(50)
    end, slowest, found = time.monotonic() + seconds, 0.0, set()
    while time.monotonic() < end:
        began = time.perf_counter()
        route = router.route(
            RouteRequest(16 * len(hashes) + 1, 16), hashes, PREFILLS, DECODES, bytes_per_token=1, now_s=0.0
        )
        await asyncio.sleep(0)
        slowest = max(slowest, time.perf_counter() - began)
        found.add((route.prefill_id, route.chosen.hit_blocks))
    assert slowest < SLOW_S, "no decision, and no turn of the event loop, waits for an answer"
    [(worker_id, hit_blocks)] = found
    assert worker_id == "w0"
    return hit_blocks


async def test_routing_goes_on_from_the_mirror_while_redis_answers_late():
    with RedisServer() as server:
        async with SlowLink.to(server.port) as link:
            url = f"redis://127.0.0.1:{link.port}"
            worker = PlayedWorker(url)
            gateway = PlayedGateway(url, worker)
            async with running(worker, gateway):
                worker.publish(hashes_of(50))
                await knows(gateway, worker)
                await well(worker.publisher, gateway.mirror)
                link.delay_s = SLOW_S
                worker.publish(hashes_of(20, seed=1))
                began = time.monotonic()
                assert await hit_of_decisions(gateway, 3 * SLOW_S) == 50
                await knows(gateway, worker)
                assert time.monotonic() - began > SLOW_S, "its answers were late"
                link.delay_s = TOO_SLOW_S
                worker.publish(hashes_of(20, seed=2))
                for part in (worker.publisher, gateway.mirror):
                    await says(part, "no answer in time")
                assert await hit_of_decisions(gateway, TIMEOUT_S) == 50
                assert gateway.mirror.trouble, "the gateway is ready, and says degraded"
                link.delay_s = 0.0
                await knows(gateway, worker)
                await until(lambda: not gateway.mirror.trouble and not worker.publisher.trouble)

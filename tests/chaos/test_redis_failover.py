"""A node of a Redis Cluster dies, and its replica takes over."""

import contextlib

import pytest

from tests.helpers.redis_servers import cluster_node, join_nodes, num_masters
from tests.helpers.redis_workers import PlayedGateway, PlayedWorker, running
from tests.helpers.waiting import until
from tests.unit.index.test_mirror import settled_in_redis
from tests.unit.index.test_redis import hashes_of

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(180)]

PATIENCE_S = 60.0


async def test_a_replica_takes_over_and_everybody_goes_on():
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(cluster_node()) for _ in range(6)]
        addresses = [f"127.0.0.1:{node.port}" for node in nodes]
        join_nodes(nodes, replicas=1)
        url = "redis://" + ",".join(addresses)
        worker = PlayedWorker(url)
        gateway = PlayedGateway(url, worker)
        async with running(worker, gateway):
            worker.publish(hashes_of(500))
            await until(lambda: gateway.knows(worker), PATIENCE_S)
            await settled_in_redis(url, worker)
            nodes[0].kill()
            await until(lambda: gateway.mirror.trouble and worker.publisher.trouble, PATIENCE_S)
            assert gateway.knows(worker), "routing goes on from the mirror"
            worker.publish(hashes_of(500, seed=1))
            worker.retract(hashes_of(500)[400:])
            await until(lambda: num_masters(nodes[1]) == 3, PATIENCE_S)
            await until(lambda: not gateway.mirror.trouble and not worker.publisher.trouble, PATIENCE_S)
            await until(lambda: gateway.knows(worker), PATIENCE_S)
            await settled_in_redis(url, worker)

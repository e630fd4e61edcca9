"""Events that a gateway missed: read from Redis where it still has them, asked of the worker where it has not."""

import contextlib

import pytest

from tailrace.index.keys import KeySpace, StreamMessage
from tailrace.kv.events import KVEvents
from tailrace.messages import KvEventBatch
from tests.helpers.redis_workers import PlayedGateway, PlayedWorker, running
from tests.helpers.waiting import PATIENCE_S, until
from tests.unit.index.test_mirror import knows, says, well
from tests.unit.index.test_redis import hashes_of

pytestmark = pytest.mark.usefixtures("quick")

KEYS = KeySpace("tailrace")
USER, PASSWORD = "gateway", "a-password-of-gateways"


@contextlib.asynccontextmanager
async def gateway_cut_off(own_server, gateway):
    """While workers go on telling Redis."""
    with contextlib.closing(own_server.client()) as client:
        client.execute_command("ACL", "SETUSER", USER, "off")
        client.execute_command("CLIENT", "KILL", "USER", USER)
        await until(lambda: gateway.mirror.trouble, PATIENCE_S)
        yield client
        client.execute_command("ACL", "SETUSER", USER, "on")
    await well(gateway.mirror)


def pair(own_server):
    with contextlib.closing(own_server.client()) as client:
        client.execute_command("ACL", "SETUSER", USER, "on", f">{PASSWORD}", "~*", "+@all")
    worker = PlayedWorker(own_server.url)
    return worker, PlayedGateway(f"redis://{USER}:{PASSWORD}@127.0.0.1:{own_server.port}", worker)


async def told(worker):
    await until(lambda: worker.publisher.registration.sequence == worker.sequence, PATIENCE_S)


async def test_what_was_told_while_a_gateway_was_cut_off_is_read_from_redis(own_server):
    worker, gateway = pair(own_server)
    async with running(worker, gateway):
        worker.publish(hashes_of(50))
        await knows(gateway, worker)
        async with gateway_cut_off(own_server, gateway):
            worker.publish(hashes_of(2000, seed=1))
            worker.retract(hashes_of(50)[20:])
            await told(worker)
        await knows(gateway, worker)
        assert worker.num_snapshots == 1, "the one on being found"


async def test_what_redis_no_longer_has_is_asked_of_the_worker(own_server):
    worker, gateway = pair(own_server)
    async with running(worker, gateway):
        worker.publish(hashes_of(50))
        await knows(gateway, worker)
        async with gateway_cut_off(own_server, gateway) as client:
            worker.publish(hashes_of(20, seed=1))
            await told(worker)
            client.xtrim(KEYS.stream_of("w0"), maxlen=0, approximate=False)
        await knows(gateway, worker)
        assert worker.num_snapshots == 2


async def test_a_stream_in_the_place_of_another_is_read_from_its_beginning(own_server):
    """As after a failover to a replica whose clock is behind, with messages that nobody here has seen."""
    worker, gateway = pair(own_server)
    async with running(worker, gateway):
        worker.publish(hashes_of(50))
        await knows(gateway, worker)
        stream = KEYS.stream_of("w0")
        async with gateway_cut_off(own_server, gateway) as client:
            worker.publish(hashes_of(20, seed=1))
            await told(worker)
            kept = client.xrange(stream)
            client.delete(stream)
            for number, (_, fields) in enumerate(kept):
                client.xadd(stream, fields, id=f"1-{number + 1}")
        await knows(gateway, worker)
        worker.publish(hashes_of(20, seed=2))
        await knows(gateway, worker)
        assert worker.num_snapshots == 1


async def test_a_message_that_got_lost_here_is_read_again(own_server, monkeypatch):
    worker, gateway = pair(own_server)
    async with running(worker, gateway):
        worker.publish(hashes_of(50))
        await knows(gateway, worker)
        with monkeypatch.context() as patch:
            patch.setattr(gateway.mirror, "_take", lambda fields: None)
            worker.publish(hashes_of(20, seed=1))
            await told(worker)
            await until(lambda: gateway.feeds.num_replays == 1, PATIENCE_S)
        worker.retract(hashes_of(20, seed=1)[5:])
        await knows(gateway, worker)
        assert worker.num_snapshots == 1


async def test_missed_events_come_in_their_order_and_are_those_of_one_worker_in_one_life(monkeypatch):
    """Two workers may share a stream."""

    def message(number, worker_id, epoch, sequence):
        flat = StreamMessage(worker_id, KvEventBatch(epoch, sequence, KVEvents.published(hashes_of(2)))).fields()
        return b"1-%d" % number, dict(zip(flat[::2], flat[1::2], strict=True))

    kept = [message(5, "w0", 2, 8), message(4, "w9", 2, 0), message(3, "w0", 2, 6), message(2, "w0", 1, 4)]

    async def one(*command):
        return kept

    mirror = PlayedGateway("redis://127.0.0.1:1").mirror
    monkeypatch.setattr(mirror._client, "one", one)
    assert [batch.first_sequence for batch in await mirror._missed("w0", 2, 6)] == [6, 8]
    assert await mirror._missed("w0", 2, 4) == [], "what was before has another life's numbers"


def unreachable():
    raise ConnectionError("no way there")


async def test_a_worker_that_cannot_be_reached_is_followed_by_redis_alone(own_server):
    worker, gateway = pair(own_server)
    async with running(worker, gateway):
        worker.publish(hashes_of(50))
        await knows(gateway, worker)
        gateway.feeds.get("w0")._snapshot = unreachable
        async with gateway_cut_off(own_server, gateway):
            worker.publish(hashes_of(20, seed=1))
            await told(worker)
        await knows(gateway, worker)


async def test_a_restarted_empty_redis_costs_no_snapshot_where_nothing_was_missed(own_server):
    worker = PlayedWorker(own_server.url)
    gateway = PlayedGateway(own_server.url, worker)
    async with running(worker, gateway):
        worker.publish(hashes_of(50))
        await knows(gateway, worker)
        own_server.kill()
        await says(gateway.mirror, "Redis at")
        worker.publish(hashes_of(20, seed=1))
        own_server.start()
        await knows(gateway, worker)
        assert worker.num_snapshots == 1

"""Redis found through Sentinels, and found again when a replica has taken over."""

import contextlib

import pytest

from tailrace.index.redis_client import RedisClient
from tailrace.index.redis_url import RedisUrl
from tailrace.index.trouble import RedisTroubleError
from tests.helpers.cluster import free_ports
from tests.helpers.redis_servers import RedisServer, Sentinel
from tests.helpers.redis_workers import PlayedGateway, PlayedWorker, running
from tests.helpers.waiting import until
from tests.unit.index.test_mirror import knows, settled_in_redis, well
from tests.unit.index.test_redis import hashes_of

PATIENCE_S = 40.0
DATA, WATCH = "a-password-for-data", "a-password-for-sentinels"


@contextlib.contextmanager
def watched_master(tls=None):
    """A master, its replica, and the Sentinel that watches both."""
    with contextlib.ExitStack() as stack:
        secrets = {"requirepass": DATA, "masterauth": DATA}
        master = stack.enter_context(RedisServer(tls=tls, **secrets))
        replica = stack.enter_context(
            RedisServer(tls=tls, **secrets, replicaof=f"127.0.0.1 {master.port}", repl_diskless_sync_delay="0")
        )
        yield master, replica, stack.enter_context(Sentinel("main", master, password=WATCH, master_password=DATA))


async def follow_a_failover(master, sentinel, url):
    """A worker and a gateway go on, from the mirror first, and then with the replica."""
    await until(sentinel.knows_a_replica, PATIENCE_S)
    worker = PlayedWorker(url)
    gateway = PlayedGateway(url, worker)
    async with running(worker, gateway):
        worker.publish(hashes_of(50))
        await knows(gateway, worker)
        master.kill()
        await until(lambda: gateway.mirror.trouble and worker.publisher.trouble, PATIENCE_S)
        assert gateway.knows(worker), "routing goes on from the mirror"
        worker.publish(hashes_of(50, seed=1))
        await until(lambda: not gateway.mirror.trouble and not worker.publisher.trouble, PATIENCE_S)
        await knows(gateway, worker)
        await settled_in_redis(url, worker)
        await well(gateway.mirror, worker.publisher)


@pytest.fixture
def watched():
    """A master, its replica, and the Sentinel that watches both."""
    with watched_master() as found:
        yield found


def url_of(sentinel, service="main", password=WATCH):
    """The first of its two Sentinels is away."""
    [nobody] = free_ports(1)
    hosts = f"127.0.0.1:{nobody},127.0.0.1:{sentinel.port}"
    return f"redis+sentinel://:{DATA}@{hosts}/{service}?sentinel_password={password}"


async def test_a_failover_is_followed(watched, monkeypatch, caplog):
    monkeypatch.setattr("tailrace.index.mirror.VISIT_S", 0.05)
    monkeypatch.setattr("tailrace.index.publisher.BEAT_S", 0.1)
    monkeypatch.setattr("tailrace.index.backoff.LONGEST_S", 0.3)
    master, _, sentinel = watched
    await follow_a_failover(master, sentinel, url_of(sentinel))
    assert f"127.0.0.1:{sentinel.port}/main" in caplog.text
    assert DATA not in caplog.text
    assert WATCH not in caplog.text


async def test_what_sentinels_refuse_is_said_without_the_password(watched):
    _, _, sentinel = watched
    for url, words in (
        (url_of(sentinel, service="other"), "its Sentinels name no master that is up"),
        (url_of(sentinel, password="wrong-password"), "its Sentinels name no master that is up"),
        (url_of(sentinel).replace(DATA, "wrong-password"), "it refuses the user or the password"),
    ):
        client = RedisClient(RedisUrl.parse(url), timeout_s=0.4)
        with pytest.raises(RedisTroubleError, match=words) as trouble:
            await client.open()
        assert "wrong-password" not in trouble.value.message
        assert WATCH not in trouble.value.message
        await client.close()

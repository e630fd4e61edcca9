"""A real Redis and a real Sentinel that speak TLS and nothing else."""

import pytest

from tailrace.index.redis_client import RedisClient
from tailrace.index.redis_url import RedisUrl
from tailrace.index.trouble import RedisTroubleError
from tests.helpers.redis_servers import Certificate, RedisServer
from tests.helpers.redis_workers import PlayedGateway, PlayedWorker, running
from tests.unit.index.test_mirror import knows, says
from tests.unit.index.test_redis import hashes_of
from tests.unit.index.test_sentinel import DATA, WATCH, follow_a_failover, watched_master


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return Certificate.make(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def watched(certificate):
    """A master, its replica, and the Sentinel that watches both."""
    with watched_master(tls=certificate) as (master, _, sentinel):
        yield master, sentinel


def url_of(sentinel, certificate, scheme="rediss"):
    options = f"sentinel_password={WATCH}" + (f"&ssl_ca_certs={certificate.ca}" if scheme == "rediss" else "")
    return f"{scheme}+sentinel://:{DATA}@127.0.0.1:{sentinel.port}/main?{options}"


async def test_sentinels_and_their_masters_are_spoken_to_over_tls_and_a_failover_is_followed(
    watched, certificate, monkeypatch
):
    monkeypatch.setattr("tailrace.index.publisher.BEAT_S", 0.1)
    monkeypatch.setattr("tailrace.index.backoff.LONGEST_S", 0.3)
    master, sentinel = watched
    await follow_a_failover(master, sentinel, url_of(sentinel, certificate))


async def test_who_does_not_trust_the_sentinel_or_speaks_no_tls_is_told(watched, certificate, tmp_path):
    _, sentinel = watched
    stranger = Certificate.make(tmp_path)
    for url in (url_of(sentinel, stranger), url_of(sentinel, certificate, "redis")):
        client = RedisClient(RedisUrl.parse(url), timeout_s=1.0)
        with pytest.raises(RedisTroubleError, match="its Sentinels name no master that is up") as trouble:
            await client.open()
        assert WATCH not in trouble.value.message
        await client.close()


async def test_over_tls(certificate):
    with RedisServer(tls=certificate) as server:
        trusting = f"rediss://127.0.0.1:{server.port}?ssl_ca_certs={certificate.ca}"
        worker, doubting = PlayedWorker(trusting), PlayedGateway(f"rediss://127.0.0.1:{server.port}")
        gateway = PlayedGateway(trusting, worker)
        async with running(worker, gateway, doubting):
            worker.publish(hashes_of(20))
            await knows(gateway, worker)
            await says(doubting.mirror, "certificate verify failed")

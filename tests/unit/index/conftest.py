"""Real Redis servers, and short times for those who speak to them."""

import pytest

from tests.helpers.redis_servers import RedisServer, redis_cluster


@pytest.fixture(scope="module")
def shared():
    """Nobody stops, kills or configures this one."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def own_server():
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def nodes():
    with redis_cluster() as nodes:
        yield nodes


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("tailrace.index.mirror.VISIT_S", 0.05)
    monkeypatch.setattr("tailrace.index.publisher.BEAT_S", 0.1)
    monkeypatch.setattr("tailrace.index.backoff.LONGEST_S", 0.3)

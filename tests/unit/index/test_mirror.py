"""Publishers and mirrors over a real Redis, and what becomes of them when something is wrong with it."""

import contextlib
import logging
import re
from pathlib import Path

import pytest

from tailrace.index.keys import KeySpace, Life
from tailrace.index.redis import RedisIndex
from tailrace.index.redis_client import RedisClient
from tailrace.index.redis_url import RedisUrl
from tailrace.index.registry import Registry
from tests.helpers.redis_workers import SECRET, PlayedGateway, PlayedWorker, running
from tests.helpers.waiting import PATIENCE_S, until
from tests.unit.index.test_redis import hashes_of

REPOSITORY = Path(__file__).parents[3]
pytestmark = pytest.mark.usefixtures("quick")

KEYS = KeySpace("tailrace")


@pytest.fixture
def server(shared):
    """Nobody stops, kills or configures this one."""
    with contextlib.closing(shared.client()) as client:
        client.flushall()
    return shared


async def knows(gateway, *workers):
    await until(lambda: all(gateway.knows(worker) for worker in workers), PATIENCE_S)


async def says(part, words, seconds=PATIENCE_S):
    await until(lambda: words in part.trouble, seconds)


async def well(*parts):
    await until(lambda: not any(part.trouble for part in parts), PATIENCE_S)


@contextlib.asynccontextmanager
async def lookups(url):
    """What somebody without a mirror would find."""
    client = RedisClient(RedisUrl.parse(url))
    await client.open()
    try:
        registry = Registry(client, KEYS, SECRET)
        await registry.read()
        yield RedisIndex(client, KEYS, registry), registry
    finally:
        await client.close()


async def in_redis(url, worker):
    """Depth of all that the worker holds."""
    async with lookups(url) as (index, _):
        return (await index.longest_prefix(list(worker.cached))).get(worker.worker_id, 0)


async def settled_in_redis(url, worker):
    while await in_redis(url, worker) != len(worker.cached):
        pass


# -- all is well ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["single", "cluster"])
async def test_a_mirror_follows_what_workers_tell(kind, request):
    url = request.getfixturevalue("server").url if kind == "single" else request.getfixturevalue("nodes")[0].url
    one, two = PlayedWorker(url, "w0"), PlayedWorker(url, "w1")
    gateway = PlayedGateway(url, one, two)
    async with running(one, two, gateway):
        await until(lambda: gateway.mirror.num_registered == 2, PATIENCE_S)
        await knows(gateway, one, two)
        for seed in range(5):
            one.publish(hashes_of(40, seed))
            two.publish(hashes_of(20, seed))
            one.retract(hashes_of(40, seed)[10 * seed + 5 :])
        await knows(gateway, one, two)
        assert gateway.index.longest_prefix(hashes_of(40, 0)) == {"w0": 5, "w1": 20}
        assert (one.num_snapshots, two.num_snapshots) == (1, 1), "one each on being found, and none for a gap"
        await settled_in_redis(url, two)
        await settled_in_redis(url, one)


async def test_a_mirror_that_comes_late_gets_a_snapshot(server):
    worker = PlayedWorker(server.url)
    gateway = PlayedGateway(server.url, worker)
    worker.publish(hashes_of(3000))
    worker.retract(hashes_of(3000)[2000:])
    async with running(worker):
        await until(lambda: not worker.publisher.trouble and worker.publisher.registration.sequence == 4000, PATIENCE_S)
        async with running(gateway):
            await knows(gateway, worker)


async def test_a_worker_that_leaves_is_forgotten(server, monkeypatch):
    monkeypatch.setattr("tailrace.index.mirror.TTL_S", 0.2)
    worker = PlayedWorker(server.url)
    gateway = PlayedGateway(server.url, worker)
    async with running(gateway):
        async with running(worker):
            worker.publish(hashes_of(10))
            await knows(gateway, worker)
            assert gateway.index.num_blocks("w0") == 10
        await until(lambda: gateway.index.num_blocks("w0") == 0, PATIENCE_S)
        assert gateway.mirror.num_registered == 0


async def test_a_new_life_replaces_the_old_one(server):
    old, new = PlayedWorker(server.url), PlayedWorker(server.url, epoch=2)
    gateway = PlayedGateway(server.url, old)
    old.publish(hashes_of(10))
    new.publish(hashes_of(30)[20:])
    async with running(gateway, old):
        await knows(gateway, old)
        gateway.workers["w0"] = new
        async with running(new):
            await knows(gateway, new)
            await says(old.publisher, "w0 is registered by a newer process")
            await settled_in_redis(server.url, new)


async def test_workers_of_another_model_are_not_followed(server):
    other = PlayedWorker(server.url, digest="another model")
    gateway = PlayedGateway(server.url, other)
    async with running(other, gateway):
        await until(lambda: "w0" in gateway.registry.workers, PATIENCE_S)
        assert gateway.mirror.num_registered == 0


# -- what is missing, what is wrong -----------------------------------------------------------------------------------


async def test_lost_messages_are_noticed_by_the_next_one(server):
    worker = PlayedWorker(server.url)
    gateway = PlayedGateway(server.url, worker)
    async with running(worker, gateway):
        worker.publish(hashes_of(5))
        await knows(gateway, worker)
        worker.cached.update(dict.fromkeys(hashes_of(8, seed=1)))
        worker.sequence += 8
        worker.publish(hashes_of(3, seed=2))
        await knows(gateway, worker)
        assert worker.num_snapshots == 2


async def test_the_last_messages_of_a_worker_are_missed_too(server, monkeypatch):
    worker = PlayedWorker(server.url)
    gateway = PlayedGateway(server.url, worker)
    async with running(worker, gateway):
        worker.publish(hashes_of(5))
        await knows(gateway, worker)
        monkeypatch.setattr(worker.publisher, "_stream_commands", lambda told, events: [])
        worker.publish(hashes_of(5, seed=1))
        await knows(gateway, worker)
        assert worker.num_snapshots == 2


async def test_garbage_in_the_streams_costs_nothing(server, caplog):
    worker = PlayedWorker(server.url)
    gateway = PlayedGateway(server.url, worker)
    async with running(worker, gateway):
        worker.publish(hashes_of(5))
        await knows(gateway, worker)
        stream = KEYS.stream_of("w0")
        good = {"worker": "w0", "epoch": "1", "sequence": "5", "kinds": b"\x01", "hashes": b"h" * 16}
        with contextlib.closing(server.client()) as client:
            for garbage in (
                {"a": "b"},
                {**good, "hashes": b"12345"},
                {**good, "kinds": b"\x01\x01"},
                {**good, "kinds": b"\x01" * 1000, "hashes": b"h" * 16000},
                {**good, "sequence": "-1"},
                {**good, "epoch": "x"},
                {**good, "worker": b"\xff\xff"},
            ):
                client.xadd(stream, garbage)
            for ignored in ({**good, "worker": "w9"}, {**good, "epoch": "9"}, {**good, "sequence": "0"}):
                client.xadd(stream, ignored)
        worker.publish(hashes_of(5, seed=1))
        await knows(gateway, worker)
        assert (gateway.mirror.num_garbage, worker.num_snapshots) == (7, 1)
        assert caplog.text.count("a stream of ours holds what no worker wrote") == 1


async def test_a_key_of_another_type_is_named(server):
    with contextlib.closing(server.client()) as client:
        client.set(KEYS.streams[0], "not a stream")
        gateway = PlayedGateway(server.url)
        async with running(gateway):
            await says(gateway.mirror, "a key of ours holds a value of another type")
            client.delete(KEYS.streams[0])
            await well(gateway.mirror)


async def test_another_version_is_refused_until_it_is_gone(server, caplog):
    worker = PlayedWorker(server.url)
    gateway = PlayedGateway(server.url, worker)
    with contextlib.closing(server.client()) as client:
        client.set(KEYS.version, "7")
        async with running(worker, gateway):
            for part in (worker.publisher, gateway.mirror):
                await says(part, "tailrace:version says '7', and this Tailrace keeps key space version 1")
            assert client.keys() == [KEYS.version], "nothing is written beside another version's keys"
            client.delete(KEYS.version)
            worker.publish(hashes_of(5))
            await knows(gateway, worker)
            client.set(KEYS.version, "8")
            for part in (worker.publisher, gateway.mirror):
                await says(part, "tailrace:version says '8'")
            assert gateway.knows(worker)


# -- Redis is away ----------------------------------------------------------------------------------------------------


async def test_redis_is_killed_and_comes_back_empty(own_server, caplog):
    worker = PlayedWorker(own_server.url)
    gateway = PlayedGateway(own_server.url, worker)
    async with running(worker, gateway):
        worker.publish(hashes_of(3000))
        await knows(gateway, worker)
        own_server.kill()
        for part in (worker.publisher, gateway.mirror):
            await says(part, f"Redis at 127.0.0.1:{own_server.port}: ")
        assert gateway.knows(worker), "routing goes on from the mirror"
        worker.publish(hashes_of(10, seed=1))
        worker.retract(hashes_of(3000)[2990:])
        own_server.start()
        await knows(gateway, worker)
        await well(worker.publisher, gateway.mirror)
        await settled_in_redis(own_server.url, worker)
        async with lookups(own_server.url) as (index, _):
            assert await index.longest_prefix(hashes_of(3000)) == {"w0": 2990}
        assert gateway.mirror.num_troubles == 1
    assert "routing goes on from what is known" in caplog.text


async def test_nobody_needs_redis_to_begin(own_server):
    own_server.kill()
    worker = PlayedWorker(own_server.url)
    gateway = PlayedGateway(own_server.url, worker)
    async with running(worker, gateway):
        worker.publish(hashes_of(5))
        for part in (worker.publisher, gateway.mirror):
            await says(part, "Connect")
        own_server.start()
        await knows(gateway, worker)


async def test_redis_is_stopped_and_goes_on(own_server):
    worker = PlayedWorker(own_server.url)
    gateway = PlayedGateway(own_server.url, worker)
    async with running(worker, gateway):
        worker.publish(hashes_of(50))
        await knows(gateway, worker)
        with own_server.stopped():
            worker.publish(hashes_of(50, seed=1))
            for part in (worker.publisher, gateway.mirror):
                await says(part, "no answer in time")
            assert gateway.index.longest_prefix(hashes_of(50)) == {"w0": 50}
        await knows(gateway, worker)
        await well(worker.publisher, gateway.mirror)


async def test_events_that_redis_missed_void_the_entries_before_them(own_server, monkeypatch):
    monkeypatch.setattr("tailrace.index.publisher.MAX_PENDING", 20)
    worker = PlayedWorker(own_server.url)
    gateway = PlayedGateway(own_server.url, worker)
    async with running(worker, gateway):
        worker.publish(hashes_of(18))
        await settled_in_redis(own_server.url, worker)
        with own_server.stopped():
            await says(worker.publisher, "no answer in time")
            worker.retract(hashes_of(18)[4:])
            worker.publish(hashes_of(15, seed=1))
            worker.publish(hashes_of(15, seed=2))
        await knows(gateway, worker)
        await settled_in_redis(own_server.url, worker)
        async with lookups(own_server.url) as (index, registry):
            assert await index.longest_prefix(hashes_of(18)) == {"w0": 4}
            assert registry.workers["w0"].edition > 0
            stale = KEYS.blocks(hashes_of(18))[10]
            assert (await index._client.one("GET", stale))[:7] == Life("w0", 1).mark, (
                "it is there, and counts for nobody"
            )


async def test_what_redis_evicted_is_told_again(server, monkeypatch):
    monkeypatch.setattr("tailrace.index.publisher.ENTRY_TTL_S", 0.6)
    worker = PlayedWorker(server.url)
    async with running(worker):
        worker.publish(hashes_of(500))
        await settled_in_redis(server.url, worker)
        with contextlib.closing(server.client()) as client:
            client.delete(*KEYS.blocks(hashes_of(250)))
        await settled_in_redis(server.url, worker)


# -- Redis refuses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (("REPLICAOF", "127.0.0.1", "1"), "it is read-only, a replica"),
        (("CONFIG", "SET", "min-replicas-to-write", "1"), "fewer replicas than min-replicas-to-write"),
        (("CONFIG", "SET", "maxmemory", "1"), "maxmemory is reached"),
    ],
)
async def test_redis_takes_no_writes(own_server, setting, words):
    undo = {"REPLICAOF": ("REPLICAOF", "NO", "ONE")}.get(setting[0], (*setting[:-1], "0"))
    worker = PlayedWorker(own_server.url)
    gateway = PlayedGateway(own_server.url, worker)
    async with running(worker, gateway):
        worker.publish(hashes_of(50))
        await knows(gateway, worker)
        with contextlib.closing(own_server.client()) as client:
            client.execute_command(*setting)
            worker.publish(hashes_of(50, seed=1))
            for part in (worker.publisher, gateway.mirror):
                await says(part, words)
            assert gateway.index.longest_prefix(hashes_of(50)) == {"w0": 50}
            client.execute_command(*undo)
        await knows(gateway, worker)
        await well(worker.publisher, gateway.mirror)


RIGHTS = re.search(r"ACL SETUSER tailrace on >PASSWORD (.+)", (REPOSITORY / "docs/redis.md").read_text())[1].split()


async def test_an_acl_user_with_the_documented_rights_is_enough(own_server):
    with contextlib.closing(own_server.client()) as client:
        client.execute_command("ACL", "SETUSER", "tail", "on", ">a-good-password", *RIGHTS)
        client.execute_command("ACL", "SETUSER", "default", "off")
    url = f"redis://tail:a-good-password@127.0.0.1:{own_server.port}"
    worker = PlayedWorker(url)
    gateway = PlayedGateway(url, worker)
    async with running(worker, gateway):
        worker.publish(hashes_of(50))
        await knows(gateway, worker)
        worker.retract(hashes_of(50)[20:])
        await knows(gateway, worker)
        await settled_in_redis(url, worker)
        async with lookups(url) as (index, _):
            assert await index.longest_prefix(hashes_of(50)) == {"w0": 20}
            assert await index.longest_prefix(hashes_of(50)) == {"w0": 20}, (
                "over the direct way, the registry being fresh"
            )
    assert worker.publisher.trouble == gateway.mirror.trouble == ""


@pytest.mark.parametrize(
    ("user", "words"),
    [
        ("tail:wrong-password", "it refuses the user or the password"),
        ("nobody:at-all-known", "it refuses the user or the password"),
        ("", "it wants a user and a password, and the URL has none"),
        ("few:a-good-password", "its ACL user lacks a right: .*'set'.*docs/redis.md lists the rights"),
        ("blind:a-good-password", "its ACL user lacks a right: .*keys.*docs/redis.md lists the rights"),
    ],
)
async def test_a_user_who_may_not_is_told_why_without_the_password(own_server, caplog, user, words):
    caplog.set_level(logging.DEBUG)
    with contextlib.closing(own_server.client()) as client:
        client.execute_command("ACL", "SETUSER", "tail", "on", ">a-good-password", *RIGHTS)
        client.execute_command("ACL", "SETUSER", "few", "on", ">a-good-password", *RIGHTS, "-set")
        client.execute_command(
            "ACL", "SETUSER", "blind", "on", ">a-good-password", "resetkeys", "~other:*", *RIGHTS[1:]
        )
        client.execute_command("ACL", "SETUSER", "default", "off")
    url = f"redis://{user}{'@' if user else ''}127.0.0.1:{own_server.port}"
    worker, gateway = PlayedWorker(url), PlayedGateway(url)
    async with running(worker, gateway):
        await until(lambda: "not connected yet" not in worker.publisher.trouble, PATIENCE_S)
        await until(lambda: "not connected yet" not in gateway.mirror.trouble, PATIENCE_S)
        assert re.search(words, worker.publisher.trouble)
        assert "Redis at" in gateway.mirror.trouble
    assert "password" not in caplog.text.replace("the user or the password", "").replace("a user and a password", "")

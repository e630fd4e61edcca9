"""Key space, lookup and registry, against a real Redis and a real Redis Cluster of three nodes."""

import asyncio
import contextlib
import random
import secrets
import time
from collections import Counter
from dataclasses import replace
from hashlib import blake2b

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tailrace.index.keys import ENTRY_BYTES, MAX_HOLDERS, KeySpace, Life
from tailrace.index.memory import MemoryIndex
from tailrace.index.prefix_index import PrefixHit
from tailrace.index.redis import RedisIndex, depths
from tailrace.index.redis_client import RedisClient
from tailrace.index.redis_url import RedisUrl
from tailrace.index.registry import Registration, Registry, Standing, check_version
from tailrace.index.trouble import RedisTroubleError
from tailrace.kv.events import Tier

SECRET = b"a secret of the tests"
KEYS = KeySpace("tailrace")


def hashes_of(count, seed=0):
    return [blake2b(b"%d %d" % (seed, number), digest_size=16).digest() for number in range(count)]


def registration(worker_id="w0", epoch=1, **said):
    fields = {"edition": 0, "role": "prefill", "address": "127.0.0.1:1", "model_digest": "m", "num_blocks": 100}
    return Registration(worker_id=worker_id, epoch=epoch, sequence=0, **{**fields, **said})


class World:
    """A client of a server, and the index and the registry over it."""

    def __init__(self, url, namespace="tailrace", secret=SECRET):
        self.client = RedisClient(RedisUrl.parse(url))
        self.keys = KeySpace(namespace)
        self.registry = Registry(self.client, self.keys, secret)
        self.index = RedisIndex(self.client, self.keys, self.registry)

    async def register(self, *workers):
        for worker in workers:
            await self.registry.beat(worker)
        await self.registry.read()


@pytest.fixture(params=["single", "cluster"])
def url(request):
    if request.param == "single":
        shared = request.getfixturevalue("shared")
        with contextlib.closing(shared.client()) as client:
            client.flushall()
        return shared.url
    nodes = request.getfixturevalue("nodes")
    for node in nodes:
        with contextlib.closing(node.client()) as client:
            client.flushall()
    return nodes[0].url


@contextlib.asynccontextmanager
async def world(url, **options):
    it = World(url, **options)
    await it.client.open()
    try:
        yield it
    finally:
        await it.client.close()


# -- blocks -----------------------------------------------------------------------------------------------------------


async def test_a_prefix_is_found_by_all_who_hold_it(url):
    hashes = hashes_of(600)
    async with world(url) as it:
        await it.register(registration("w0"), registration("w1"))
        await it.index.publish(Life("w0", 1), hashes)
        await it.index.publish(Life("w1", 1), hashes[:100])
        assert await it.index.longest_prefix(hashes) == {"w0": 600, "w1": 100}
        await it.index.retract(Life("w0", 1), hashes[50:])
        assert await it.index.longest_prefix(hashes) == {"w0": 50, "w1": 100}
        await it.index.retract(Life("w1", 1), hashes[:100])
        assert await it.index.longest_prefix(hashes) == {"w0": 50}
        assert await it.index.longest_prefix(hashes_of(3, seed=9)) == {}
        assert await it.index.longest_prefix([]) == {}


async def test_tiers_are_told_a_holder_and_a_block(url):
    first, second, third = hashes_of(3)
    async with world(url) as it:
        await it.register(registration("w0"), registration("store"))
        await it.index.publish(Life("w0", 1), [first])
        await it.index.publish(Life("store", 1), [first], Tier.CPU)
        await it.index.publish(Life("store", 1), [second], Tier.NVME)
        assert await it.index.holders([first, second, third]) == [
            {"w0": Tier.WORKER, "store": Tier.CPU},
            {"store": Tier.NVME},
            {},
        ]
        assert await it.index.longest_prefix_by_tier([first, second, third]) == {
            "w0": PrefixHit(1, (1, 0, 0)),
            "store": PrefixHit(2, (0, 1, 1)),
        }
        await it.index.publish(Life("store", 1), [first], Tier.NVME)
        assert (await it.index.holders([first]))[0]["store"] is Tier.NVME


async def test_it_agrees_with_the_index_in_memory(url):
    draw = random.Random(7)
    chains = [hashes_of(40, seed) for seed in range(4)]
    memory = MemoryIndex()
    workers = [f"w{number}" for number in range(5)]
    async with world(url) as it:
        await it.register(*(registration(worker) for worker in workers))
        for _ in range(60):
            worker, chain = draw.choice(workers), draw.choice(chains)
            some = chain[draw.randrange(8) :][: draw.randrange(40)]
            if draw.random() < 0.7:
                memory.publish(worker, 1, some)
                await it.index.publish(Life(worker, 1), some)
            else:
                memory.retract(worker, 1, some)
                await it.index.retract(Life(worker, 1), some)
        for chain in chains:
            for span in (1, 3, 50):
                assert await it.index.deepest_runs(chain, span) == memory.deepest_runs(chain, span)
            found, exact = await it.index.longest_prefix(chain), memory.longest_prefix(chain)
            assert_ends_of_what_is_held(found, exact, await it.index.holders(chain), it.client.is_cluster)
            assert {w: hit.num_blocks for w, hit in (await it.index.longest_prefix_by_tier(chain)).items()} == exact


def assert_ends_of_what_is_held(found, exact, holders, is_cluster):
    """A search that skips holes finds the same workers, none at less, and each where blocks are missing.

    The nodes of a Cluster skip holes each by itself, so that the block before that may be one.
    """
    assert found.keys() == exact.keys()
    for worker, depth in found.items():
        assert depth >= exact[worker]
        assert is_cluster or worker in holders[depth - 1]
        assert depth == len(holders) or worker not in holders[depth]


@given(st.lists(st.integers(0, 70), max_size=9), st.integers(1, 70))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_search_finds_where_each_prefix_ends(url, depths_held, length):
    """Prefixes of any lengths, alone and several of one length, in one script call a node."""

    async def look():
        async with world(url) as it:
            hashes = hashes_of(70, seed=secrets.randbits(64))
            workers = [f"w{number}" for number in range(len(depths_held))]
            await it.register(*(registration(worker) for worker in workers))
            for worker, depth in zip(workers, depths_held, strict=True):
                await it.index.publish(Life(worker, 1), hashes[:depth])
            expected = {w: min(depth, length) for w, depth in zip(workers, depths_held, strict=True) if depth}
            assert await it.index.longest_prefix(hashes[:length]) == expected

    asyncio.run(look())


async def test_holders_of_a_block_are_bounded_and_the_newest_stay(url):
    [block] = hashes_of(1)
    workers = [f"w{number}" for number in range(MAX_HOLDERS + 3)]
    async with world(url) as it:
        await it.register(*(registration(worker) for worker in workers))
        for worker in [*workers, workers[3]]:
            await it.index.publish(Life(worker, 1), [block])
        assert len(await it.client.one("GET", *KEYS.blocks([block]))) == MAX_HOLDERS * ENTRY_BYTES
        assert (await it.index.longest_prefix([block])).keys() == set(workers[3:])


async def test_entries_end_by_themselves(url):
    async with world(url) as it:
        [key] = KEYS.blocks(hashes := hashes_of(1))
        await it.index.publish(Life("w0", 1), hashes)
        await it.index.publish(Life("w1", 1), hashes)
        await it.index.retract(Life("w1", 1), hashes)
        assert 3_500_000 < await it.client.one("PTTL", key) <= 3_600_000
        await it.index.retract(Life("w0", 1), hashes)
        assert await it.client.one("EXISTS", key) == 0


async def test_values_that_nobody_here_wrote_cost_hits_and_are_replaced(url):
    hashes = hashes_of(5)
    keys = KEYS.blocks(hashes)
    async with world(url) as it:
        await it.register(registration("w0"))
        await it.index.publish(Life("w0", 1), hashes[:2])
        for key, value in zip(keys[2:4], [b"garbage", b"x" * 4096], strict=True):
            await it.client.one("SET", key, value)
        await it.client.one("RPUSH", keys[4], b"a list")
        assert await it.index.longest_prefix(hashes) == {"w0": 2}
        await it.index.publish(Life("w0", 1), hashes)
        assert await it.index.longest_prefix(hashes) == {"w0": 5}
        await it.client.one("SET", keys[0], b"garbage")
        await it.index.retract(Life("w0", 1), hashes[:1])
        assert await it.client.one("EXISTS", keys[0]) == 0


async def test_a_script_that_redis_has_forgotten_is_sent_again(url):
    hashes = hashes_of(300)
    async with world(url) as it:
        await it.register(registration("w0"))
        await it.index.publish(Life("w0", 1), hashes[:200])
        target = {"target_nodes": "all"} if it.client.is_cluster else {}
        await it.client.library.execute_command("SCRIPT FLUSH", **target)
        await it.index.publish(Life("w0", 1), hashes)
        assert await it.index.longest_prefix(hashes) == {"w0": 300}


def num_commands(server):
    """By name, of those that came over a connection or were carried out in a script."""
    with contextlib.closing(server.client()) as client:
        return Counter({name: told["calls"] for name, told in client.info("commandstats").items()})


async def test_a_lookup_is_one_command_on_a_single_redis(shared):
    async with world(shared.url) as it:
        hashes = hashes_of(256, seed=10)
        await it.register(registration("w0"))
        await it.index.publish(Life("w0", 1), hashes)
        await it.index.longest_prefix(hashes)
        before = num_commands(shared)
        assert await it.index.longest_prefix(hashes) == {"w0": 256}
        spent = num_commands(shared) - before
        assert [spent[f"cmdstat_{name}"] for name in ("evalsha", "get", "eval", "mget")] == [1, 2, 0, 0]
        await it.index.retract(Life("w0", 1), hashes[100:])
        before = num_commands(shared)
        assert await it.index.longest_prefix(hashes) == {"w0": 100}
        assert (num_commands(shared) - before)["cmdstat_get"] <= 2 + 8


async def test_a_lookup_is_one_command_a_node_on_a_cluster(nodes):
    async with world(nodes[0].url) as it:
        hashes = hashes_of(256, seed=11)
        await it.register(registration("w0"))
        await it.index.publish(Life("w0", 1), hashes)
        await it.index.longest_prefix(hashes)
        before = [num_commands(node) for node in nodes]
        assert await it.index.longest_prefix(hashes) == {"w0": 256}
        for node, was in zip(nodes, before, strict=True):
            spent = num_commands(node) - was
            assert [spent[f"cmdstat_{name}"] for name in ("evalsha", "get", "eval", "mget")] == [1, 2, 0, 0]


async def test_a_lookup_follows_a_slot_to_another_node(nodes):
    hashes = hashes_of(64, seed=12)
    slot = KEYS.slots[hashes[5][0]]
    async with world(nodes[0].url) as it, contextlib.AsyncExitStack() as stack:
        clients = [stack.enter_context(contextlib.closing(node.client())) for node in nodes]
        ids = [client.execute_command("CLUSTER MYID").decode() for client in clients]
        [before] = it.client.owners([slot])
        was = [node.port for node in nodes].index(before.port)
        for client in clients:
            client.flushall()
        move(clients, slot, ids[(was + 1) % len(ids)])
        try:
            async with world(nodes[1].url) as other:
                await other.register(registration("w0"))
                await other.index.publish(Life("w0", 1), hashes)
            assert await it.index.longest_prefix(hashes) == {"w0": 64}
            assert it.client.owners([slot]) != [before], "it has learned where the slot is"
            num_mgets = sum(num_commands(node)["cmdstat_mget"] for node in nodes)
            assert await it.index.longest_prefix(hashes) == {"w0": 64}
            assert sum(num_commands(node)["cmdstat_mget"] for node in nodes) == num_mgets
        finally:
            for client in clients:
                client.flushall()
            move(clients, slot, ids[was])


def move(clients, slot, node_id):
    """A slot that holds nothing."""
    for client in clients:
        client.execute_command("CLUSTER SETSLOT", slot, "NODE", node_id)


async def test_one_prompt_lies_on_all_nodes_alike(nodes):
    async with world(nodes[0].url) as it:
        await it.index.publish(Life("w0", 1), hashes_of(3000))
        counts = []
        for node in nodes:
            with contextlib.closing(node.client()) as client:
                counts.append(sum(1 for _ in client.scan_iter(match="tailrace:1:{??}*", count=1000)))
        assert sum(counts) == 3000
        assert max(counts) < 1.35 * 1000


def test_depths_of_workers_that_come_and_go():
    one, two = Life("one", 1), Life("two", 1)
    both, only = one.entry(Tier.WORKER) + two.entry(Tier.CPU), one.entry(Tier.WORKER)
    swapped = two.entry(Tier.CPU) + one.entry(Tier.WORKER)
    marks = {one.mark: "one", two.mark: "two"}
    assert depths([both, swapped, only, both], marks) == {"one": 4, "two": 2}
    assert depths([only, both], marks) == {"one": 2}
    assert depths([None, both], marks) == depths([b"", both], marks) == depths([], marks) == {}
    assert depths([both, None], marks) == {"one": 1, "two": 1}
    assert depths([both], {one.mark: "one"}) == {"one": 1}
    assert depths([both, both], {}) == {}


# -- registry ---------------------------------------------------------------------------------------------------------


async def test_a_worker_takes_its_entries_along_when_it_leaves_or_begins_anew(url):
    hashes = hashes_of(10)
    async with world(url) as it:
        await it.register(registration("w0", epoch=5))
        await it.index.publish(Life("w0", 5), hashes)
        assert await it.index.longest_prefix(hashes) == {"w0": 10}
        await it.register(registration("w0", epoch=6))
        assert await it.index.longest_prefix(hashes) == {}, "a new life holds nothing yet"
        await it.index.publish(Life("w0", 6), hashes[:4])
        await it.register(registration("w0", epoch=6, edition=1))
        assert await it.index.longest_prefix(hashes) == {}, "nor does a new edition"
        await it.index.publish(Life("w0", 6, 1), hashes[:2])
        assert await it.index.longest_prefix(hashes) == {"w0": 2}
        await it.registry.leave(registration("w0", epoch=5))
        await it.registry.read()
        assert await it.index.longest_prefix(hashes) == {"w0": 2}, "an old life cannot end the new one"
        await it.registry.leave(registration("w0", epoch=6))
        await it.registry.read()
        assert await it.index.longest_prefix(hashes) == {}


async def test_a_registration_that_is_not_renewed_runs_out(url, monkeypatch):
    monkeypatch.setattr("tailrace.index.registry.TTL_S", 1.0)
    async with world(url) as it:
        assert await it.registry.beat(registration()) is Standing.NEW
        assert await it.registry.beat(registration()) is Standing.RENEWED
        await it.registry.read()
        assert it.registry.workers == {"w0": registration()}
        deadline = time.monotonic() + 15
        while it.registry.workers and time.monotonic() < deadline:
            await it.registry.read()
        assert it.registry.workers == {}
        assert await it.client.one("SCARD", KEYS.names) == 1
        assert await it.registry.beat(registration("w1")) is Standing.NEW
        assert await it.client.one("SMEMBERS", KEYS.names) == {b"w1"}, "a newcomer strikes off who is gone"


async def test_an_older_life_is_fenced(url):
    async with world(url) as it:
        await it.registry.beat(registration(epoch=7))
        with pytest.raises(RedisTroubleError, match="w0 is registered by a newer process"):
            await it.registry.beat(registration(epoch=6))
        await it.registry.read()
        assert it.registry.workers["w0"].epoch == 7


async def test_the_registry_is_bounded(url, monkeypatch):
    monkeypatch.setattr("tailrace.index.registry.MAX_WORKERS", 2)
    async with world(url) as it:
        await it.register(registration("w0"), registration("w1"))
        with pytest.raises(RedisTroubleError, match="w2 is one too many: 2 workers"):
            await it.registry.beat(registration("w2"))
        assert await it.registry.beat(registration("w1")) is Standing.RENEWED


async def test_registrations_of_others_and_garbage_are_passed_over(url, caplog):
    forged = registration("w3").signed(b"another secret")
    changed = registration("w4").signed(SECRET).replace(b"127.0.0.1:1", b"127.0.0.1:2")
    stolen = registration("w0").signed(SECRET)
    values = {"w1": b"garbage", "w2": b"[]", "w3": forged, "w4": changed, "w5": b"{}", "w6": b"9" * 5000, "w7": stolen}
    async with world(url) as it:
        await it.registry.beat(registration("w0"))
        for name, value in values.items():
            await it.client.one("SADD", KEYS.names, name)
            await it.client.one("SET", KEYS.worker(name), value)
        await it.client.one("SADD", KEYS.names, b"\xff\xfe")
        await it.registry.read()
        await it.registry.read()
        assert it.registry.workers.keys() == {"w0"}
        assert it.registry.num_refused == 7
        assert caplog.text.count("registrations in Redis are not of this cluster") == 1
        assert await it.registry.beat(registration("w1")) is Standing.RENEWED, "garbage is written over"


@pytest.mark.parametrize("field", ["epoch", "edition", "num_blocks", "sequence"])
@pytest.mark.parametrize("value", [-1, 1.5, "1", None, True, 1 << 64])
def test_a_signed_registration_is_checked_all_the_same(field, value):
    said = replace(registration(), **{field: value}).signed(SECRET)
    with pytest.raises(ValueError, match=field):
        Registration.read(said, SECRET)


# -- version, namespace -----------------------------------------------------------------------------------------------


async def test_keys_of_another_version_are_refused_by_its_name(url):
    async with world(url) as it:
        await check_version(it.client, it.keys)
        await it.registry.beat(registration())
        await check_version(it.client, it.keys)
        await it.client.one("SET", KEYS.version, "2")
        for refused in (check_version(it.client, it.keys), it.registry.beat(registration()), it.registry.visit("g")):
            with pytest.raises(RedisTroubleError, match=r"tailrace:version says '2'.* keeps key space version 1"):
                await refused


async def test_namespaces_do_not_meet(url):
    hashes = hashes_of(5)
    async with world(url) as one, world(url, namespace="other") as other:
        await one.register(registration())
        await one.index.publish(Life("w0", 1), hashes)
        await other.registry.read()
        assert other.registry.workers == {}
        assert await other.index.longest_prefix(hashes) == {}
        assert await one.index.longest_prefix(hashes) == {"w0": 5}

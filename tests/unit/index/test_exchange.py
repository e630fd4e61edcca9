"""Gateways that tell one another over a real Redis what they have in flight."""

import asyncio
import contextlib
import json
import time
from collections import Counter

import pytest

from tailrace.index.exchange import MAX_BYTES, Exchange, Message, _signature
from tailrace.index.keys import KeySpace
from tailrace.index.memory import MemoryIndex
from tailrace.index.redis_client import RedisClient
from tailrace.index.redis_url import RedisUrl
from tailrace.policy.other_routers import Given, InFlight, RouterNews
from tailrace.policy.router import Router
from tailrace.policy.routing import RouteRequest, WorkerView
from tailrace.types import Role
from tests.helpers.values import SECRET
from tests.helpers.waiting import PATIENCE_S, in_background, until
from tests.unit.index.test_redis import hashes_of

KEYS = KeySpace("tailrace")
TIMEOUT_S = 0.4
PREFILLS = [WorkerView(f"p{n}", Role.PREFILL, b"", prefill_tokens_per_s=100.0) for n in range(8)]
DECODES = [WorkerView("d0", Role.DECODE, b"", decode_step_s=0.01, max_num_seqs=1000)]


class PlayedGateway:
    """A router, and its share in the exchange; no workers."""

    def __init__(self, url, name):
        self.router = Router(MemoryIndex())
        client = RedisClient(RedisUrl.parse(url), timeout_s=TIMEOUT_S)
        self.exchange = Exchange(client, KEYS, router_id=name, secret=SECRET, news=self._news, hear=self._hear)
        self.router.share(name, self.exchange.changed)
        self.heard = frozenset()
        """Workers that another has something in flight to, by its last news."""

    def _news(self):
        return self.router.news({}, time.monotonic())

    def _hear(self, name, news, ttl_s):
        self.router.hear(name, news, time.monotonic(), ttl_s)
        self.heard = frozenset(news.in_flight)

    @property
    def num_others(self):
        return self.router.num_others(time.monotonic())

    def send(self, number, num_blocks=20):
        """A prompt; where it went."""
        request, hashes = RouteRequest(16 * num_blocks + 1, 16), hashes_of(num_blocks, seed=number)
        now_s = time.monotonic()
        route = self.router.route(request, hashes, PREFILLS, DECODES, bytes_per_token=1, now_s=now_s)
        self.router.hold(route, number, now_s, len(PREFILLS))
        return route.prefill_id


@contextlib.asynccontextmanager
async def sharing(*gateways):
    async with in_background(*(gateway.exchange.run() for gateway in gateways)):
        await until(lambda: all(gateway.exchange.is_following for gateway in gateways), PATIENCE_S)
        yield


async def burst(one, other, *, told):
    """Largest over mean number of equal prompts a worker gets, of one for each worker, sent in turn."""
    taken = Counter()
    for number in range(len(PREFILLS)):
        sender, hearer = (one, other) if number % 2 else (other, one)
        taken[worker_id := sender.send(number)] += 1
        if told:
            await until(lambda: worker_id in hearer.heard, PATIENCE_S)  # noqa: B023 - it is called here only
    return max(taken.values())


@pytest.mark.parametrize("kind", ["single", "cluster"])
async def test_a_burst_over_two_gateways_spreads_as_over_one(kind, request):
    url = request.getfixturevalue("own_server").url if kind == "single" else request.getfixturevalue("nodes")[0].url
    one, other = PlayedGateway(url, "g0"), PlayedGateway(url, "g1")
    async with sharing(one, other):
        assert await burst(one, other, told=True) == 1
        assert (one.num_others, other.num_others) == (1, 1)


async def test_without_it_the_same_burst_herds():
    alone = [PlayedGateway("redis://127.0.0.1:1", "") for _ in range(2)]
    assert await burst(*alone, told=False) == 2


async def test_a_gateway_that_dies_takes_what_it_told_along(own_server):
    one, other = PlayedGateway(own_server.url, "g0"), PlayedGateway(own_server.url, "g1")
    async with sharing(other):
        async with sharing(one):
            one.send(1)
            await until(lambda: other.num_others == 1, PATIENCE_S)
            await asyncio.sleep(1.2)
            assert other.num_others == 1, "told again while it lasts"
        await until(lambda: other.num_others == 0, PATIENCE_S)


async def test_what_is_computed_is_told(own_server, monkeypatch):
    monkeypatch.setattr("tailrace.index.exchange.TTL_S", 10.0)
    one, other = PlayedGateway(own_server.url, "g0"), PlayedGateway(own_server.url, "g1")
    async with sharing(one, other):
        worker_id = one.send(1)
        await until(lambda: other.num_others == 1, PATIENCE_S)
        one.router.release(worker_id, 1, time.monotonic())
        await until(lambda: other.num_others == 0, 5.0)  # long before it runs out by itself


async def test_nothing_is_told_where_nothing_happens(own_server):
    one, other = PlayedGateway(own_server.url, "g0"), PlayedGateway(own_server.url, "g1")
    async with sharing(one, other):
        await asyncio.sleep(0.5)
        with contextlib.closing(own_server.client()) as client:
            assert client.exists(KEYS.reservations) == 0


async def test_nobody_waits_while_redis_is_away_and_sharing_goes_on_when_it_is_back(own_server, monkeypatch):
    monkeypatch.setattr("tailrace.index.backoff.LONGEST_S", 0.3)
    one, other = PlayedGateway(own_server.url, "g0"), PlayedGateway(own_server.url, "g1")
    async with sharing(one, other):
        one.send(1)
        await until(lambda: other.num_others == 1, PATIENCE_S)
        own_server.kill()
        await until(lambda: one.exchange.trouble and other.exchange.trouble, PATIENCE_S)
        began = time.monotonic()
        for number in range(100, 120):
            other.send(number)
        assert time.monotonic() - began < 20 * TIMEOUT_S / 4
        await until(lambda: other.num_others == 0, PATIENCE_S)
        own_server.start()
        await until(lambda: one.num_others == other.num_others == 1, PATIENCE_S)
        assert not one.exchange.trouble


async def test_a_stopped_redis_holds_nobody_up(own_server):
    one, other = PlayedGateway(own_server.url, "g0"), PlayedGateway(own_server.url, "g1")
    async with sharing(one, other):
        with own_server.stopped():
            one.send(1)
            await until(lambda: "no answer in time" in one.exchange.trouble, PATIENCE_S)
            assert one.send(2)
        await until(lambda: other.num_others == 1, PATIENCE_S)


async def test_nothing_is_written_beside_another_versions_keys(own_server):
    with contextlib.closing(own_server.client()) as client:
        client.set(KEYS.version, "7")
        gateway = PlayedGateway(own_server.url, "g0")
        task = asyncio.create_task(gateway.exchange.run())
        gateway.send(1)
        await until(lambda: "tailrace:version says '7'" in gateway.exchange.trouble, PATIENCE_S)
        assert client.keys() == [KEYS.version]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# -- messages ---------------------------------------------------------------------------------------------------------

NEWS = RouterNews(
    {"p0": InFlight(1.5, 100, 2, frozenset({b"12345678", b"abcdefgh"})), "p1": InFlight(0.25)}, (Given("p0", 1.5),)
)


def as_read(message):
    told = message.fields(SECRET)
    return dict(zip(told[::2], told[1::2], strict=True))


def signed(fields):
    """As somebody who has the secret would send it."""
    values = [value for name, value in fields.items() if name != b"signature"]
    if not all(isinstance(value, bytes) for value in values):
        return fields
    return {**fields, b"signature": _signature(values, SECRET)}


def test_a_message_is_read_as_it_was_written():
    message = Message("g0", 1.0, NEWS)
    assert Message.read(as_read(message), SECRET) == message


def test_a_message_of_another_cluster_or_one_that_was_changed_is_refused():
    said = as_read(Message("g0", 1.0, NEWS))
    with pytest.raises(ValueError, match="signed with another secret"):
        Message.read(said, b"another secret of a cluster")
    with pytest.raises(ValueError, match="signed with another secret"):
        Message.read({**said, b"ttl_ms": b"2000"}, SECRET)


def test_what_is_beyond_others_bounds_is_told_as_their_bound():
    """One number that nobody believes would make them forget all that this gateway has in flight."""
    news = RouterNews({"p0": InFlight(1e9), "p1": InFlight(float("nan"))}, (Given("p0", float("inf")),))
    found = Message.read(as_read(Message("g0", 1.0, news)), SECRET).news
    assert {name: there.prefill_s for name, there in found.in_flight.items()} == {"p0": 86_400.0, "p1": 0.0}
    assert found.given == (Given("p0", 86_400.0),)


@pytest.mark.parametrize(
    "changes",
    [
        {b"ttl_ms": b"99999999"},
        {b"ttl_ms": b"x"},
        {b"ttl_ms": b"-1"},
        {b"workers": b"[]"},
        {b"workers": b"[1]"},
        {b"workers": b"{"},
        {b"workers": b"1"},
        {b"workers": json.dumps({"p0": [1, 2]}).encode()},
        {b"workers": json.dumps({"p0": [-1, 0, 0, 0]}).encode()},
        {b"workers": b'{"p0": [NaN, 0, 0, 0]}'},
        {b"workers": b'{"p0": [1e999, 0, 0, 0]}'},
        {b"workers": b'{"p0": ["x", 0, 0, 0]}'},
        {b"workers": b'{"p0": [0, 0, 0, 10000000]}'},
        {b"workers": b'{"p0": [0, 0, 1' + b"0" * 400 + b", 0]}"},
        {b"workers": json.dumps({f"p{n}": [0, 0, 0, 0] for n in range(2000)}).encode()},
        {b"given": b"{}x"},
        {b"given": b"7"},
        {b"given": json.dumps([["p0", 1]] * 2000).encode()},
        {b"given": b'[["p0", -1]]'},
        {b"marks": b"x" * 8 * 600},
        {b"marks": b"x" * (MAX_BYTES + 1)},
        {b"router": b"\xff\xff"},
        {b"router": 7},
    ],
)
def test_what_no_gateway_wrote_is_refused(changes):
    with pytest.raises(ValueError, match=r"."):
        Message.read(signed({**as_read(Message("g0", 1.0, NEWS)), **changes}), SECRET)


async def test_garbage_is_passed_over_and_logged_once(own_server, caplog):
    one, other = PlayedGateway(own_server.url, "g0"), PlayedGateway(own_server.url, "g1")
    async with sharing(one, other):
        with contextlib.closing(own_server.client()) as client:
            for garbage in ({"a": "b"}, {**as_read(Message("g7", 1.0, NEWS)), b"workers": b"[]"}):
                client.xadd(KEYS.reservations, garbage)
        one.send(1)
        await until(lambda: other.num_others == 1, PATIENCE_S)
    assert other.exchange.num_garbage == 2
    assert caplog.text.count("holds what no gateway wrote") == 2, "once a gateway"

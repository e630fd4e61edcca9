import dataclasses
import heapq
from collections.abc import Callable
from itertools import count

import pytest

from tailrace.kv.events import Tier
from tailrace.policy.fetching import UNKNOWN_PATIENCE_S
from tailrace.policy.routing import PrefixRange
from tailrace.sim.fetching import Fetching, Holders, LearntWays
from tailrace.sim.prefill import FetchedShare, PrefillJob, PrefillNode
from tailrace.sim.profile import PROFILES
from tailrace.sim.workload import SimRequest, block_name

BLOCK, BLOCK_BYTES = 512, 1 << 20
PROFILE = dataclasses.replace(PROFILES["h100"], fetch_overhead_s=0.01, link_bytes_per_s=float(BLOCK_BYTES * 100))
"""A block takes 10 ms."""


class World:
    """p0 holds blocks 1 to `held`, p1 needs them."""

    def __init__(self, *, held: int, num_blocks: int = 100, slowdown: float = 1.0) -> None:
        self.holder, self.needer = (PrefillNode(name, num_blocks, BLOCK, PROFILE) for name in ("p0", "p1"))
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = count()
        holders = Holders({"p0": self.holder, "p1": self.needer}, {}, {})
        self.fetching = Fetching(
            holders,
            PROFILE,
            BLOCK_BYTES,
            at=self.at,
            wake=lambda worker_id, now_s: None,
            slowdown=lambda now_s: slowdown,
        )
        first = self.job(1, held)
        self.holder.accept(first)
        self.compute(self.holder)
        self.holder.give_back(first)

    def at(self, when_s: float, act: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._order), act))

    def job(self, number: int, num_blocks: int, *sources: PrefixRange) -> PrefillJob:
        names = tuple(map(block_name, range(num_blocks)))
        return PrefillJob(number, SimRequest(0.0, num_blocks * BLOCK, 1, names), "d0", sources)

    def compute(self, node: PrefillNode) -> None:
        while node.start(0.0) is not None:
            node.finish()

    def fetch(self, depth: int) -> PrefillJob:
        """A prompt of one block more than the `depth` that p0 is said to hold."""
        job = self.job(2, depth + 1, PrefixRange("p0", 0, depth))
        self.needer.accept(job)
        assert self.needer.start(0.0) is None, "it waits for its prefix"
        self.fetching.begin(self.needer, 0.0)
        return job

    def run(self, until_s: float = 100.0) -> None:
        while self._events and self._events[0][0] <= until_s:
            now_s, _, act = heapq.heappop(self._events)
            act(now_s)


def test_an_idle_holder_answers_at_once() -> None:
    world = World(held=4)
    job = world.fetch(4)
    world.run()
    assert job.fetches == [FetchedShare("p0", 4, pytest.approx(0.01 + 4 * 0.01))]
    world.compute(world.needer)
    assert (job.hit_tokens, job.fetched_tokens) == (0, 4 * BLOCK)
    world.holder.pool.check_integrity()
    assert world.holder.pool.ledger().cached == 4, "its loan is over"


def test_a_fetch_takes_its_turn_on_the_cores_that_others_compute_on() -> None:
    world = World(held=4, slowdown=1.5)
    job = world.fetch(4)
    world.run()
    assert job.fetches == [FetchedShare("p0", 4, pytest.approx(1.5 * (0.01 + 4 * 0.01)))]


def test_a_holder_that_computes_answers_between_two_steps() -> None:
    world = World(held=4)
    world.holder.accept(PrefillJob(3, SimRequest(0.0, BLOCK, 1, (block_name(99),)), "d0"))
    assert world.holder.start(0.0) is not None
    job = world.fetch(4)
    world.run(0.5)
    assert not job.fetches
    world.holder.finish()
    for command in world.holder.drain_commands():
        command(0.5)
    world.run()
    assert job.fetches == [FetchedShare("p0", 4, pytest.approx(0.5 + 0.01 + 4 * 0.01))]


def test_what_is_late_is_computed() -> None:
    world = World(held=4)
    world.holder.accept(PrefillJob(3, SimRequest(0.0, BLOCK, 1, (block_name(99),)), "d0"))
    world.holder.start(0.0)
    job = world.fetch(4)
    world.run()
    assert job.fetches == [FetchedShare("p0", 0, UNKNOWN_PATIENCE_S)]
    world.compute(world.needer)
    assert (job.hit_tokens, job.fetched_tokens) == (0, 0)
    world.holder.finish()
    for command in world.holder.drain_commands():
        command(2.0)
    assert world.holder.pool.ledger().lent == 1, "the prompt that it computed; nothing for who left"


def test_a_worker_lends_a_tenth_of_its_pool_at_a_time() -> None:
    world = World(held=6, num_blocks=40)
    job = world.fetch(6)
    world.run()
    assert job.fetches == [FetchedShare("p0", 6, pytest.approx(2 * 0.01 + 6 * 0.01))]
    world.compute(world.needer)
    assert job.fetched_tokens == 6 * BLOCK


def test_a_holder_that_has_less_than_was_said_gives_what_it_has() -> None:
    world = World(held=2)
    job = world.fetch(4)
    world.run()
    assert [share.num_blocks for share in job.fetches] == [2]
    world.compute(world.needer)
    assert job.fetched_tokens == 2 * BLOCK


def test_a_router_learns_what_fetches_take() -> None:
    ways = LearntWays(Holders({}, {}, {}))
    before = ways.way("p0", "p1", Tier.WORKER)
    for num_blocks in (1, 9) * 50:
        ways.learn("p1", FetchedShare("p0", num_blocks, 0.2 + 0.01 * num_blocks), BLOCK_BYTES, 0.0)
    way = ways.way("p0", "p1", Tier.WORKER)
    assert before is not None
    assert before.overhead_s < 0.1
    assert way is not None
    assert way.overhead_s == pytest.approx(0.2, rel=1e-3)
    assert way.s_per_byte * BLOCK_BYTES == pytest.approx(0.01, rel=1e-3)
    ways.learn("p1", FetchedShare("p0", 0, 1.0), BLOCK_BYTES, 5.0)
    assert ways.way("p0", "p1", Tier.WORKER) is None, "nothing came: it is left alone for a while"


def test_a_router_that_has_seen_fetches_knows_every_kind() -> None:
    profile = dataclasses.replace(PROFILES["h100"], fetch_overhead_s=0.02)
    ways = LearntWays(Holders({}, {}, {}))
    ways.know(profile)
    rates = (profile.link_bytes_per_s, profile.host_bytes_per_s, profile.nvme_bytes_per_s)
    for holder, rate in zip(("p0", "p0/cpu", "p0/nvme"), rates, strict=True):
        way = ways.way(holder, "p1", Tier.WORKER)
        assert way is not None
        assert (way.overhead_s, way.s_per_byte) == pytest.approx((0.02, 1 / rate), rel=0.01), holder

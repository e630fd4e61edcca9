"""From a worker's snapshot and events to the compact index."""

import random
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from services.gateway.index_feed import IndexFeed
from tailrace.index.prefix_index import PrefixHit
from tailrace.kv.block_pool import BlockPool
from tailrace.kv.events import KVEvents, Tier
from tailrace.messages import KvEventBatch
from tailrace.types import Role
from tests.helpers.fake_members import settle, worker_info
from tests.helpers.index import compact_index

A, B, C, D = (letter * 16 for letter in (b"a", b"b", b"c", b"d"))


def feed_of(*pieces: KvEventBatch, num_blocks: int = 100) -> IndexFeed:
    async def snapshot() -> AsyncIterator[KvEventBatch]:
        for piece in pieces:
            yield piece

    info = replace(worker_info("w", Role.DECODE), num_blocks=num_blocks)
    return IndexFeed(info, compact_index(), snapshot)


async def test_a_snapshot_in_pieces_keeps_the_tiers() -> None:
    feed = feed_of(
        KvEventBatch(1, 7, KVEvents.published([A, B], Tier.CPU)),
        KvEventBatch(1, 7, KVEvents.published([C], Tier.NVME) + KVEvents.published([D])),
    )
    feed.open()
    feed.take(KvEventBatch(1, 7, KVEvents.published([B], Tier.NVME)))
    await settle()
    assert feed._index.longest_prefix_by_tier([A, B, C, D]) == {"w": PrefixHit(4, (1, 1, 2))}


async def test_a_worker_may_hold_twice_its_pool_and_no_more() -> None:
    feed = feed_of(KvEventBatch(1, 0, KVEvents()), num_blocks=1)
    feed.open()
    await settle()
    feed.take(KvEventBatch(1, 0, KVEvents.published([A, B, C])))
    assert feed._index.longest_prefix([A, B, C]) == {"w": 2}


@pytest.mark.parametrize("seed", range(20))
async def test_events_replayed_over_a_later_snapshot_of_a_full_pool_lose_nothing(seed: int) -> None:
    rng = random.Random(seed)
    pool = BlockPool(8, epoch=1)
    hashes = [rng.randbytes(16) for _ in range(24)]

    def churn() -> None:
        blocks = pool.allocate(rng.randrange(1, 9))
        assert blocks is not None
        for block in blocks:
            pool.register(block, rng.choice(hashes))
        pool.release(blocks)

    for _ in range(10):
        churn()
    num_known = len(pool.drain_events())
    for _ in range(6):
        churn()
    events = pool.drain_events()
    feed = feed_of(KvEventBatch(1, num_known, KVEvents.published(pool.cached_hashes())), num_blocks=8)
    feed.open()
    await settle()
    feed.take(KvEventBatch(1, num_known, KVEvents.of(events)))
    held = pool.cached_hashes()
    assert feed._index.num_blocks("w") == len(held)
    assert all(feed._index.longest_prefix([block_hash]) == {"w": 1} for block_hash in held)

"""From a worker's snapshot and events to the compact index."""

import random
from collections.abc import AsyncIterator

import pytest

from tailrace.index.feeds import Feed, Feeds, Holder, Source
from tailrace.index.prefix_index import PrefixHit
from tailrace.kv.block_pool import BlockPool
from tailrace.kv.events import KVEvents, Tier
from tailrace.messages import KvEventBatch
from tests.helpers.fake_members import settle
from tests.helpers.index import compact_index

A, B, C, D = (letter * 16 for letter in (b"a", b"b", b"c", b"d"))


def feed_of(*pieces: KvEventBatch, num_blocks: int = 100) -> Feed:
    async def snapshot() -> AsyncIterator[KvEventBatch]:
        for piece in pieces:
            yield piece

    return Feeds(compact_index()).hold(Holder("w", 1, num_blocks), Source.ATTACH, snapshot)


async def test_a_snapshot_in_pieces_keeps_the_tiers() -> None:
    feed = feed_of(
        KvEventBatch(1, 7, KVEvents.published([A, B], Tier.CPU)),
        KvEventBatch(1, 7, KVEvents.published([C], Tier.NVME) + KVEvents.published([D])),
    )
    feed.take(KvEventBatch(1, 7, KVEvents.published([B], Tier.NVME)))
    await settle()
    assert feed._index.longest_prefix_by_tier([A, B, C, D]) == {"w": PrefixHit(4, (1, 1, 2))}


async def test_a_worker_may_hold_twice_its_pool_and_no_more() -> None:
    feed = feed_of(KvEventBatch(1, 0, KVEvents()), num_blocks=1)
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
    await settle()
    feed.take(KvEventBatch(1, num_known, KVEvents.of(events)))
    held = pool.cached_hashes()
    assert feed._index.num_blocks("w") == len(held)
    assert all(feed._index.longest_prefix([block_hash]) == {"w": 1} for block_hash in held)


async def test_a_feed_lives_until_every_source_has_released_it() -> None:
    async def snapshot() -> AsyncIterator[KvEventBatch]:
        yield KvEventBatch(1, 0, KVEvents.published([A]))

    index = compact_index()
    feeds = Feeds(index)
    feed = feeds.hold(Holder("w", 1, 10), Source.REDIS, snapshot)
    assert feeds.hold(Holder("w", 1, 10), Source.ATTACH, snapshot) is feed
    await settle()
    assert (feeds.num_snapshots, index.num_blocks("w")) == (1, 1)
    void = feeds.hold(Holder("w", 0, 10), Source.ATTACH, snapshot)
    feeds.release(void, Source.ATTACH)
    feeds.release(feed, Source.ATTACH)
    feeds.release(feed, Source.ATTACH)
    assert (feeds.get("w"), index.num_blocks("w")) == (feed, 1)
    feeds.release(feed, Source.REDIS)
    assert (feeds.get("w"), index.num_blocks("w")) == (None, 0)


async def test_the_same_news_twice_changes_nothing_and_waits_for_no_snapshot() -> None:
    feed = feed_of(KvEventBatch(1, 0, KVEvents()))
    await settle()
    for _ in range(2):
        feed.take(KvEventBatch(1, 0, KVEvents.published([A, B])))
        feed.take(KvEventBatch(1, 2, KVEvents.retracted([A])))
    feed.take(KvEventBatch(1, 1, KVEvents.published([B]) + KVEvents.retracted([A]) + KVEvents.published([C])))
    assert feed.next_sequence == 4
    assert feed._index.num_blocks("w") == 2
    assert feed._feeds.num_snapshots == 1

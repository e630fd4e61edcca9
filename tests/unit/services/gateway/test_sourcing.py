"""Whom a prefill worker is told to fetch a prefix from, and what is learnt of it. Played by fake workers and stores."""

import dataclasses
from collections.abc import Sequence

import pytest

from services.gateway.session import RequestSession
from tailrace.errors import WorkerLostError
from tailrace.kv.events import KVEvents, Tier
from tailrace.kv.hashing import chain_seed, hash_blocks
from tailrace.messages import Fetch, KvEventBatch, LegReport, Load, OwnerRate, PrefixSource, StepEvents, Submission
from tailrace.types import FinishReason
from tests.helpers.fake_members import BLOCK, LAYOUT, FakeCluster, FakeWorker, fake_cluster, settle

PROMPT = list(range(400))
BLOCKS = 400 // BLOCK
SLOW = Load(total_blocks=1000, free_blocks=1000, prefill_tokens_per_s=100.0)
"""Recomputing the prompt takes 4 s: whatever can be fetched is."""


async def holds(worker: FakeWorker, num_blocks: int, *, on_disk: int = 0) -> None:
    hashes = hash_blocks(PROMPT, BLOCK, chain_seed(LAYOUT.fingerprint, "", ""))[:num_blocks]
    memory = num_blocks - on_disk
    sequence = 0
    for part, tier in (
        (hashes[:memory], Tier.CPU if worker.info.worker_id[0] == "s" else Tier.WORKER),
        (hashes[memory:], Tier.NVME),
    ):
        if part:
            await worker.say(StepEvents(kv_events=KvEventBatch(1, sequence, KVEvents.published(part, tier))))
            sequence += len(part)


def named(sources: Sequence[PrefixSource]) -> list[tuple[str, int, int]]:
    assert all(source.source.ticket == b"" for source in sources)
    return [(source.source.worker_id, source.first_block, source.num_blocks) for source in sources]


async def busy(cluster: FakeCluster, worker: FakeWorker) -> None:
    """Nobody would wait for it."""
    await worker.say(
        StepEvents(load=Load(total_blocks=1000, free_blocks=1000, prefill_tokens_per_s=100.0, waiting_tokens=10**6))
    )


async def submitted(cluster: FakeCluster) -> Submission:
    """Where the prompt's prefill went just now; it is cancelled again."""
    session = await cluster.submit(PROMPT)
    worker, decode = cluster.pair_of(session)
    assert worker is not None
    assert decode.last.prefix_sources == ()
    await session.aclose()
    return worker.last


async def test_a_prefix_that_a_busy_worker_holds_is_fetched_from_it():
    async with fake_cluster(prefill=2, load=SLOW) as cluster:
        await holds(cluster.prefills[1], 90)
        await busy(cluster, cluster.prefills[1])
        (source,) = (await submitted(cluster)).prefix_sources
        info = cluster.prefills[1].info
        assert source.source.worker_id == info.worker_id
        assert (source.source.epoch, source.source.address, source.source.ticket) == (info.epoch, info.address, b"")
        assert (source.first_block, source.num_blocks) == (0, 90)


async def test_decode_workers_and_stores_are_holders_too():
    async with fake_cluster(stores=1, load=SLOW) as cluster:
        await holds(cluster.decode, 50)
        assert named((await submitted(cluster)).prefix_sources) == [("d0", 0, 50)]
        await holds(cluster.stores[0], 80)
        assert named((await submitted(cluster)).prefix_sources) == [("s0", 0, 80)]


async def test_what_the_worker_holds_itself_is_claimed_for_the_store_too():
    async with fake_cluster(stores=1, load=SLOW) as cluster:
        await holds(cluster.prefill, 30)
        await holds(cluster.stores[0], 80)
        assert named((await submitted(cluster)).prefix_sources) == [("s0", 0, 80)]


async def test_a_store_takes_no_request_and_its_loss_is_noticed():
    async with fake_cluster(stores=1, load=SLOW) as cluster:
        await holds(cluster.stores[0], 80)
        assert named((await submitted(cluster)).prefix_sources) == [("s0", 0, 80)]
        assert cluster.stores[0].submissions == []
        await cluster.leave(cluster.stores[0])
        assert (await submitted(cluster)).prefix_sources == ()


@pytest.mark.parametrize("is_store", [False, True])
async def test_a_holder_that_drains_is_no_source(is_store):
    async with fake_cluster(prefill=2, stores=1, load=SLOW) as cluster:
        holder = cluster.stores[0] if is_store else cluster.prefills[1]
        await holds(holder, 80)
        await holder.say(StepEvents(load=Load(total_blocks=1000, free_blocks=1000, draining=True)))
        assert (await submitted(cluster)).prefix_sources == ()


async def test_a_replay_names_sources_and_never_the_lost_one():
    async with fake_cluster(prefill=3, stores=1, load=SLOW) as cluster:
        holder = cluster.prefills[2]
        await holds(holder, 90)
        await holds(cluster.stores[0], 70)
        for worker in (holder, cluster.prefills[1]):
            await busy(cluster, worker)
        session = await cluster.submit(PROMPT)
        assert named(cluster.prefill.last.prefix_sources)[-1][0] == "p2"
        await cluster.leave(holder)
        await cluster.leave(cluster.prefill)
        await settle()
        worker, _ = cluster.pair_of(session)
        assert worker is cluster.prefills[1]
        assert named(worker.last.prefix_sources) == [("s0", 0, 70)]
        await session.aclose()


async def fetched(cluster: FakeCluster, fetch: Fetch, **tiers: int) -> None:
    """A request whose prefill reports this."""
    session = await cluster.submit(PROMPT)
    worker, decode = cluster.pair_of(session)
    assert worker is not None
    cached = sum(tiers.values())
    await worker.tokens([7], report=LegReport(0, fetches=(fetch,), cached_tokens=cached, cached_by_tier=tiers))
    await decode.tokens([7], reason=FinishReason.STOP)
    await session.aclose()


async def test_a_fetch_that_failed_is_left_alone_for_a_while_and_then_tried_again():
    now = [0.0]
    async with fake_cluster(stores=2, load=SLOW, clock=lambda: now[0]) as cluster:
        await holds(cluster.stores[0], 90)
        await holds(cluster.stores[1], 60)
        failure = Fetch("s0", 90, 0, 0, 0.5)
        await fetched(cluster, failure)
        assert named((await submitted(cluster)).prefix_sources) == [("s1", 0, 60)]
        now[0] = 1.1
        assert "s0" in {name for name, _, _ in named((await submitted(cluster)).prefix_sources)}
        await fetched(cluster, failure)
        now[0] = 2.5
        assert named((await submitted(cluster)).prefix_sources) == [("s1", 0, 60)]


async def test_a_slow_pair_is_learnt_and_the_others_are_not_blamed():
    async with fake_cluster(stores=2, load=SLOW) as cluster:
        await holds(cluster.stores[0], 90)
        num_bytes = 90 * LAYOUT.block_bytes
        for _ in range(3):
            await fetched(cluster, Fetch("s0", 90, 90, num_bytes, 60.0), cpu=360)
        assert (await submitted(cluster)).prefix_sources == (), "computing it takes 4 s"
        await holds(cluster.stores[1], 60)
        assert named((await submitted(cluster)).prefix_sources) == [("s1", 0, 60)], "what is slow is one pair"
        await fetched(cluster, Fetch("s1", 60, 60, 60 * LAYOUT.block_bytes, 0.001), cpu=240)
        assert named((await submitted(cluster)).prefix_sources) == [("s1", 0, 60)]


async def test_a_holder_over_a_link_that_its_needer_calls_slow_is_not_asked():
    """Of one that was never fetched from."""
    async with fake_cluster(stores=1, load=SLOW) as cluster:
        await holds(cluster.stores[0], 90)
        slow = dataclasses.replace(SLOW, owners=(OwnerRate("s0", 90 * LAYOUT.block_bytes / 60.0),))
        await cluster.prefill.say(StepEvents(load=slow))
        assert (await submitted(cluster)).prefix_sources == (), "computing it takes 4 s"


async def test_a_store_s_disk_has_a_rate_of_its_own():
    async with fake_cluster(stores=1, load=SLOW) as cluster:
        await holds(cluster.stores[0], 90, on_disk=90)
        assert named((await submitted(cluster)).prefix_sources) == [("s0", 0, 90)]
        for _ in range(2):
            await fetched(cluster, Fetch("s0", 90, 90, 90 * LAYOUT.block_bytes, 60.0), nvme=360)
        assert (await submitted(cluster)).prefix_sources == ()
        async with fake_cluster(stores=1, load=SLOW) as other:
            await holds(other.stores[0], 90)
            await fetched(other, Fetch("s0", 90, 90, 90 * LAYOUT.block_bytes, 60.0), nvme=360)
            assert named((await submitted(other)).prefix_sources) == [("s0", 0, 90)], "its memory is not its disk"


async def test_a_holder_that_leaves_between_choice_and_submission_is_not_named(monkeypatch):
    async with fake_cluster(stores=1, load=SLOW) as cluster:
        await holds(cluster.stores[0], 80)
        real = cluster.members.get

        def get(worker_id):
            if worker_id == "s0":
                raise WorkerLostError("gone")
            return real(worker_id)

        monkeypatch.setattr(cluster.members, "get", get)
        assert (await submitted(cluster)).prefix_sources == ()


async def finish(cluster: FakeCluster, session: RequestSession) -> None:
    worker, decode = cluster.pair_of(session)
    assert worker is not None
    await worker.tokens([7], report=LegReport(0, prefill_s=0.01))
    await decode.tokens([7], reason=FinishReason.STOP)
    await session.aclose()


@pytest.mark.parametrize("num_tokens", [BLOCK - 1, 40], ids=["no whole block", "blocks that no event tells of"])
async def test_a_session_goes_back_to_where_it_was_among_equals(num_tokens):
    async with fake_cluster(prefill=3, decode=3) as cluster:
        other = await cluster.submit(range(100, 100 + num_tokens))
        first = await cluster.submit(range(num_tokens), session_id="a")
        pair = cluster.pair_of(first)
        assert pair != cluster.pair_of(other) == (cluster.prefills[0], cluster.decodes[0])
        await finish(cluster, first)
        await finish(cluster, other)
        fresh = await cluster.submit(range(200, 200 + num_tokens))
        assert cluster.pair_of(fresh) == (cluster.prefills[0], cluster.decodes[0])
        await finish(cluster, fresh)
        again = await cluster.submit(range(num_tokens), session_id="a")
        assert cluster.pair_of(again) == pair
        await again.aclose()


async def test_another_tenant_s_session_of_the_same_id_is_another_one():
    async with fake_cluster(prefill=2, decode=2) as cluster:
        other = await cluster.submit(range(100, 103))
        mine = await cluster.submit(range(3), session_id="a", cache_salt="mine")
        assert cluster.pair_of(mine) == (cluster.prefills[1], cluster.decodes[1])
        await finish(cluster, mine)
        await finish(cluster, other)
        theirs = await cluster.submit(range(3), session_id="a", cache_salt="theirs")
        assert cluster.pair_of(theirs) == (cluster.prefills[0], cluster.decodes[0])
        await theirs.aclose()


async def test_two_holders_are_named_each_with_its_own_end():
    async with fake_cluster(prefill=2, stores=1, load=SLOW) as cluster:
        await busy(cluster, cluster.prefills[1])
        await holds(cluster.prefills[1], 60)
        await holds(cluster.stores[0], 90)
        # At the same rate for both, and far above their fixed costs.
        num_bytes = 10**9
        for holder, tier in (("p1", "peer"), ("s0", "cpu")):
            for size in (num_bytes // 10, num_bytes):
                await fetched(cluster, Fetch(holder, 90, 90, size, size * 1e-5), **{tier: 360})
        assert named((await submitted(cluster)).prefix_sources) == [("p1", 0, 45), ("s0", 0, 90)]


SHORT_STEPS = Load(total_blocks=1000, free_blocks=1000, prefill_tokens_per_s=100.0, decode_step_s=0.5)


async def local(cluster: FakeCluster, *fetches: Fetch, **tiers: int) -> Submission:
    """What the decode worker that prefills was told; it reports these fetches."""
    session = await cluster.submit(PROMPT)
    prefill, decode = cluster.pair_of(session)
    assert prefill is None
    told = decode.last
    assert told.source is None
    report = LegReport(0, fetches=fetches, cached_tokens=sum(tiers.values()), cached_by_tier=tiers)
    await decode.tokens([7], report=report, reason=FinishReason.STOP)
    await session.aclose()
    return told


async def test_a_decode_worker_that_prefills_is_told_who_holds_the_prefix():
    async with fake_cluster(prefill=1, stores=1, load=SHORT_STEPS) as cluster:
        await busy(cluster, cluster.prefill)
        await holds(cluster.prefill, 90)
        assert named((await local(cluster)).prefix_sources) == [("p0", 0, 90)]


async def test_what_a_decode_worker_says_of_its_fetches_is_learnt():
    now = [0.0]
    async with fake_cluster(prefill=0, stores=1, load=SLOW, clock=lambda: now[0]) as cluster:
        await holds(cluster.stores[0], 90)
        num_bytes = 90 * LAYOUT.block_bytes
        # What a sequence got back that had given way says nothing of a tier.
        for _ in range(3):
            await local(cluster, Fetch("s0", 90, 90, num_bytes, 60.0))
        assert named((await local(cluster, Fetch("s0", 90, 0, 0, 0.5))).prefix_sources) == [("s0", 0, 90)]
        assert (await local(cluster)).prefix_sources == (), "it failed a moment ago"
        now[0] = 1.1
        for _ in range(3):
            await local(cluster, Fetch("s0", 90, 90, num_bytes, 60.0), cpu=360)
        assert (await local(cluster)).prefix_sources == (), "computing it takes 4 s"

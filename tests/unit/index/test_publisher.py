"""What a publisher has still to tell again, without a Redis."""

from tailrace.index.keys import MAX_EVENTS
from tailrace.kv.events import KVEvents, Tier
from tailrace.messages import KvEventBatch
from tests.helpers.redis_workers import PlayedWorker

A, B, C = (letter * 16 for letter in (b"a", b"b", b"c"))
NOWHERE = "redis://127.0.0.1:1"


async def test_a_block_that_moved_is_not_told_again_where_it_was() -> None:
    worker = PlayedWorker(NOWHERE)
    worker.cached = dict.fromkeys((A, B, C))
    await worker.publisher._tell_all_again()
    worker.publisher.offer(KvEventBatch(1, 0, KVEvents.published([A], Tier.NVME) + KVEvents.retracted([B])))
    assert worker.publisher._untold == {C: Tier.WORKER}


async def test_a_block_that_moved_while_the_worker_answered_is_not_told_again_where_it_was() -> None:
    worker = PlayedWorker(NOWHERE)
    publisher = worker.publisher

    async def cached() -> KVEvents:
        publisher.offer(KvEventBatch(1, 0, KVEvents.published([A], Tier.NVME)))
        return KVEvents.published([A, B], Tier.CPU)

    publisher._cached = cached
    await publisher._tell_all_again()
    assert publisher._untold == {B: Tier.CPU}
    assert [(event.block_hash, event.tier) for event in publisher._pending] == [(A, Tier.NVME)]


async def test_events_of_several_messages_are_numbered_through() -> None:
    worker = PlayedWorker(NOWHERE)
    events = KVEvents.published([b"%016d" % number for number in range(2 * MAX_EVENTS + 1)])
    commands = worker.publisher._stream_commands(worker.publisher.registration, events)
    told = [command[command.index(b"sequence") + 1] for command in commands]
    assert told == [b"0", b"%d" % MAX_EVENTS, b"%d" % (2 * MAX_EVENTS)]

import asyncio

import numpy as np
import pytest

from tailrace.transfer import BlockRead, PoolMemory, ReadOutcome, ReadResult
from tailrace.transfer.local import LocalLink, LocalNeeder
from tailrace.transfer.reads import MAX_SAMPLES, SAMPLE_S, BlockRun, PendingRead, RateMeter, judge, plan_read
from tests.helpers.transfer_pools import blocks_of, contents, make_pool


def reads_of(*pairs: tuple[int, int]) -> list[BlockRead]:
    return [BlockRead(source, 1000 + source * 4096, (1 << 32) + source, target) for source, target in pairs]


def test_runs_are_contiguous_on_both_sides() -> None:
    plan = plan_read(reads_of((5, 1), (3, 9), (4, 10), (6, 2), (7, 4)), make_pool())
    assert plan.runs == (
        BlockRun(3, 1000 + 3 * 4096, 9, 2),
        BlockRun(5, 1000 + 5 * 4096, 1, 2),
        BlockRun(7, 1000 + 7 * 4096, 4, 1),
    )
    assert plan.num_bytes == 5 * 4096


def test_a_gap_in_the_addresses_ends_a_run() -> None:
    reads = [BlockRead(0, 0, 0, 0), BlockRead(1, 8192, 0, 1)]
    assert [run.num_blocks for run in plan_read(reads, make_pool()).runs] == [1, 1]


@pytest.mark.parametrize("pairs", [[], [(0, 3), (1, 3)], [(0, 32)], [(0, -1)]])
def test_targets_that_cannot_be_written_are_misuse(pairs: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="target"):
        plan_read(reads_of(*pairs), make_pool())


def test_one_block_may_be_read_into_two() -> None:
    assert len(plan_read(reads_of((3, 0), (3, 1)), make_pool()).runs) == 2


def test_a_generation_off_by_one_is_stale() -> None:
    plan = plan_read(reads_of((0, 0), (1, 1)), make_pool())
    stamps = np.array([1 << 32, (1 << 32) + 1], dtype=np.uint64)
    assert judge(plan, stamps) == (ReadOutcome.GOOD, "")
    stamps[1] += 1
    assert judge(plan, stamps)[0] is ReadOutcome.STALE


def test_the_rate_is_weighted_by_size() -> None:
    now = [0.0]
    rate = RateMeter(lambda: now[0])
    assert rate.bytes_per_s == 0
    rate.add(1_000_000_000, 0.5)
    assert rate.bytes_per_s == pytest.approx(2e9)
    for _ in range(5):
        now[0] += 1.0
        rate.add(1000, 0.001)
        assert rate.bytes_per_s == pytest.approx(2e9, rel=0.01)


def test_one_slow_transfer_changes_no_rate_and_a_slow_link_does() -> None:
    now = [0.0]
    rate = RateMeter(lambda: now[0])

    def read(seconds: float) -> None:
        now[0] += 1.0
        rate.add(1_000_000, seconds)

    for seconds in (0.001, 0.001, 5.0, 0.001):
        read(seconds)
        assert rate.bytes_per_s == pytest.approx(1e9)
    for _ in range(MAX_SAMPLES // 2 + 1):
        read(0.1)
    assert rate.bytes_per_s == pytest.approx(1e7)


def test_the_chunks_of_one_prompt_are_one_sample() -> None:
    now = [0.0]
    rate = RateMeter(lambda: now[0])
    for seconds in (0.001, 0.001, 0.001):
        now[0] += 1.0
        rate.add(20_000_000, seconds)
    now[0] += 1.0
    for _ in range(20):
        now[0] += SAMPLE_S / 25
        rate.add(1_000_000, 0.5)
    assert (rate.num_samples, rate.used_s) == (4, now[0])
    assert rate.bytes_per_s == pytest.approx(2e10)


@pytest.mark.parametrize(("num_bytes", "seconds"), [(0, 1.0), (10, 0.0), (10, float("nan")), (10, -1.0)])
def test_an_impossible_read_is_not_measured(num_bytes: int, seconds: float) -> None:
    rate = RateMeter()
    rate.add(num_bytes, seconds)
    assert rate.num_samples == 0


async def test_a_settlement_refuses_cancels_and_survives_a_closed_loop() -> None:
    pending = PendingRead(asyncio.get_running_loop())
    assert not pending.settled.cancel()
    assert await pending.wait(0.001) is None
    result = ReadResult(ReadOutcome.GOOD, 0.1, 1)
    await asyncio.to_thread(pending.settle, result)
    assert await pending.wait() is result

    closed = asyncio.new_event_loop()
    late = PendingRead(closed)
    closed.close()
    late.settle(result)
    assert not late.settled.done()


async def test_local_copies_and_judges() -> None:
    source, target = make_pool(seed=3), make_pool()
    link = LocalLink(source, target)
    reads = [BlockRead(4, 0, (1 << 32) + 4, 7), BlockRead(5, 4096, (1 << 32) + 5, 8)]
    assert (await link.read(reads).wait()).outcome is ReadOutcome.GOOD
    assert np.array_equal(blocks_of(target)[7:9], contents(32, 4096, seed=3)[4:6])
    source.stamps[5] += 1
    assert (await link.read(reads).wait()).outcome is ReadOutcome.STALE
    assert LocalNeeder(target, {"owner": source})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_blocks": 0}, "a pool of 0 blocks"),
        ({"memory": "tape"}, "memory"),
        ({"stamps": np.zeros(4, dtype=np.int64)}, "stamps"),
        ({"stamps": np.zeros(5, dtype=np.uint64)}, "stamps"),
        ({"stamps": np.zeros(8, dtype=np.uint64)[::2]}, "stamps"),
        ({"view": memoryview(bytearray(15))}, "view"),
        ({"view": memoryview(bytes(16))}, "view"),
    ],
)
def test_memory_that_does_not_fit_together_is_misuse(change: dict, message: str) -> None:
    good = {
        "address": 1,
        "block_bytes": 4,
        "num_blocks": 4,
        "view": memoryview(bytearray(16)),
        "stamps": np.zeros(4, dtype=np.uint64),
    }
    assert PoolMemory(**good).num_bytes == 16
    with pytest.raises(ValueError, match=message):
        PoolMemory(**good | change)

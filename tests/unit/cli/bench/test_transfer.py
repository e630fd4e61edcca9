import pytest

from tailrace.cli.bench.transfer import TransferBenchOptions, _measure, report
from tailrace.cli.bench.transfer_pair import SHAPES, make_reads
from tailrace.cli.pair_rate import make_pool
from tailrace.config import UpConfig
from tailrace.transfer import PeerEndpoints
from tailrace.transfer.reads import plan_read

PEER = PeerEndpoints("w", 1, 4096, 8, None, None)
OPTIONS = TransferBenchOptions(num_blocks=4, block_bytes=4096, rounds=2, num_ranges=3)


@pytest.mark.parametrize(("shape", "runs"), [("blocks", 4), ("range", 1)])
def test_blocks_travel_one_by_one_or_as_one_range(shape, runs):
    plan = plan_read(make_reads(shape, range(4, 8), PEER), make_pool(8, 4096))
    assert len(plan.runs) == runs
    assert {read.target_block for read in plan.reads} == set(range(4, 8))


def seconds(**ways):
    return {"seconds": dict.fromkeys(SHAPES, ways), "missing": {}}


def test_ratios_are_of_rates_within_a_round():
    times = seconds(memcpy=[1.0, 2.0], socket=[4.0, 4.0], nixl=[2.0, 4.0], stream=[5.0, 5.0])
    result = report({}, OPTIONS, times)
    assert result["nixl_over_memcpy"] == {"median": 0.5, "min": 0.5, "max": 0.5}
    assert result["stream_over_socket"]["median"] == 0.8
    assert result["range"]["gb_per_s"]["memcpy"]["max"] == round(4 * 4096 / 1e9, 2)


def test_the_worse_shape_counts():
    found = seconds(memcpy=[1.0], socket=[1.0], stream=[1.0])
    found["seconds"] = {**found["seconds"], "range": {"memcpy": [1.0], "socket": [1.0], "stream": [4.0]}}
    result = report({}, OPTIONS, found)
    assert result["stream_over_socket"]["median"] == 0.25
    assert "nixl_over_memcpy" not in result


def test_two_processes_move_blocks_every_way_and_check_what_arrived():
    found = _measure(UpConfig(transport="stream"), OPTIONS)
    assert set(found["seconds"]["blocks"]) == {"memcpy", "socket", "stream"}
    assert all(len(times) == 2 and min(times) > 0 for shape in SHAPES for times in found["seconds"][shape].values())

"""What `bench tiers` moves and counts."""

import json
from itertools import cycle, islice
from pathlib import Path

import pytest

from tailrace.cli.bench.tier_hits import PATTERNS, HitOptions, ideal_hit_rate, measure_hits
from tailrace.cli.bench.tiers import RATIOS, TierOptions, layout_of, run_tiers
from tailrace.errors import ConfigError

SMALL = HitOptions(memory_slots=64, conversation_blocks=8, requests=60)


def test_the_result_has_a_rate_of_every_arm_and_says_what_it_is_held_against(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = TierOptions(str(tmp_path), (4096,), 1 << 20, 1)
    run_tiers(options, SMALL, as_json=True)
    result = json.loads(capsys.readouterr().out)
    found = result["sizes"]["4096"]
    assert found["num_blocks"] == 256
    assert set(found["gb_per_s"]) == set(RATIOS) | set(RATIOS.values())
    assert all(rate["median"] > 0 for rate in found["gb_per_s"].values())
    assert all(found[f"{name}_over_{limit}"]["median"] > 0 for name, limit in RATIOS.items())
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_holds_all_finds_all_and_memory_alone_does_not(tmp_path: Path) -> None:
    for found in measure_hits(tmp_path, SMALL).values():
        assert found["memory_and_disk"] == 1.0
        assert 0 < found["memory"] < 0.9
        assert found["ratio"] == found["ceiling"] == pytest.approx(1 / found["memory"], rel=1e-3)
        assert found["memory"] <= found["ideal"] < 1.0


def test_who_knows_the_future_keeps_half_of_what_comes_in_turn() -> None:
    """Recency alone would find nothing of it."""
    assert ideal_hit_rate(SMALL, lambda options: cycle(range(options.num_conversations))) == pytest.approx(0.5, abs=0.1)
    assert ideal_hit_rate(SMALL, lambda _: cycle(range(8))) == pytest.approx(1.0, abs=0.01)
    assert ideal_hit_rate(SMALL, lambda _: cycle(range(9))) == pytest.approx(8 / 9, abs=0.02)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_is_the_same_every_time_and_reaches_every_conversation(name: str) -> None:
    first, second = (list(islice(PATTERNS[name](SMALL), 2000)) for _ in range(2))
    assert first == second
    assert set(first) == set(range(SMALL.num_conversations)) == set(range(16))


@pytest.mark.parametrize("size", [0, 63, 100])
def test_a_size_that_no_block_has_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match="a multiple of 64"):
        layout_of(size)

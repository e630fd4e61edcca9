import json

import pytest
from typer.testing import CliRunner

from tailrace.cli.bench import index as bench
from tailrace.cli.bench.index import PROMPT_BLOCKS, IndexBenchOptions, _churn, measure, prompt, run_index, summary
from tailrace.cli.main import app
from tailrace.errors import UnavailableError
from tailrace.kv.events import KVEventKind

OPTIONS = IndexBenchOptions(blocks=(3000,), workers=3, lookups=10, rounds=2, batches=5)


def test_a_small_run_measures_everything_of_both_arms(capsys):
    run_index(OPTIONS, as_json=True)
    result = json.loads(capsys.readouterr().out)
    (size,) = result["sizes"]
    for arm in ("compact", "naive"):
        assert set(size[arm]["lookup_us"]) == {"24", "750", "750 by tier", "750 shared"}
        assert all(times["p99"] >= times["p50"] > 0 for times in size[arm]["lookup_us"].values())
        assert size[arm]["events_per_s"]["min"] > 0
    assert size["compact"]["events_per_s_from_the_wire"]["min"] > 0
    assert set(size["compact_over_naive"]["lookup_p50"]) == set(size["compact"]["lookup_us"])


def test_events_keep_the_number_of_blocks_and_both_arms_end_alike(monkeypatch):
    arms = measure(OPTIONS, 3000)
    counts = {name: [arm.index.num_blocks(bench.name(worker)) for worker in range(3)] for name, arm in arms.items()}
    assert counts["compact"] == counts["naive"]
    assert sum(counts["compact"]) == 3000 + 3 * PROMPT_BLOCKS
    monkeypatch.setattr(bench, "NAIVE_MAX_BLOCKS", 2999)
    assert set(measure(OPTIONS, 3000)) == {"compact"}


def test_a_batch_drops_what_an_earlier_one_took_up():
    taken, dropped = {}, {}
    for number, (worker, events) in enumerate(_churn(IndexBenchOptions(workers=3, batches=12), 4, 0)):
        for event in events:
            (taken if event.kind is KVEventKind.PUBLISH else dropped).setdefault(number, set()).add(
                (worker, event.block_hash)
            )
    assert all(taken[number] == dropped[number + 4] for number in range(8))


def test_prompts_differ():
    assert len({prompt(number) for number in (*range(100), bench._SHARED)}) == 101


def test_a_wrong_answer_ends_the_run(monkeypatch):
    monkeypatch.setattr(bench.CompactIndex, "longest_prefix", lambda index, hashes: {})
    with pytest.raises(UnavailableError, match="the compact index found 0 holders of prompt"):
        measure(OPTIONS, 3000)


def test_ratios_are_of_medians():
    arms = measure(OPTIONS, 3000)
    arms["compact"].events_per_s, arms["naive"].events_per_s = [30.0, 10.0, 20.0], [5.0]
    arms["compact"].rss_bytes, arms["naive"].rss_bytes = 3000 * 14, 3000 * 280
    said = summary(3000, arms)
    assert said["compact"]["bytes_a_block"] == 14.0
    assert (said["compact_over_naive"]["events_per_s"], said["compact_over_naive"]["bytes_a_block"]) == (4.0, 0.05)


@pytest.mark.parametrize("arguments", [["--blocks", "999"], ["--blocks", "20000001"], ["--workers", "1025"]])
def test_sizes_are_bounded(arguments):
    assert CliRunner().invoke(app, ["bench", "index", *arguments]).exit_code == 2

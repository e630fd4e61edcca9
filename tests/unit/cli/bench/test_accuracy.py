import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

from tailrace.cli.bench.agreement import GreedyAgreement, Pair, TextScores, greedy_agreement
from tailrace.cli.bench.corpus import PROMPTS, shipped_text
from tailrace.cli.bench.engine_loop import EngineLoop, LoopOptions
from tailrace.cli.bench.teacher_forcing import Places, by_decode, by_prefill
from tailrace.cli.main import app
from tests.helpers.tiny_model import make_tiny_model

PAIR = Pair("coarse", "exact")


def places(probabilities, tokens):
    return Places(torch.tensor(probabilities).log() + 3.0, torch.tensor(tokens))


def test_perplexity_divergence_and_agreement_by_hand():
    scores = TextScores([PAIR])
    scores.add({"exact": places([[0.5, 0.5, 0.0]], [0]), "coarse": places([[0.25, 0.75, 0.0]], [0])})
    scores.add({"exact": places([[0.5, 0.25, 0.25]], [2]), "coarse": places([[0.5, 0.25, 0.25]], [2])})
    assert scores.perplexity("exact") == pytest.approx(math.sqrt(2 * 4))
    assert scores.perplexity("coarse") == pytest.approx(math.sqrt(4 * 4))
    said = scores.agreement(PAIR)
    assert said.perplexity_ratio == pytest.approx(math.sqrt(2))
    # The differences are ln 2 and 0: their mean's standard error is ln 2 / 2.
    error = 1.96 * math.log(2) / 2
    assert said.perplexity_ratio_low == pytest.approx(math.sqrt(2) * math.exp(-error))
    assert said.perplexity_ratio_high == pytest.approx(math.sqrt(2) * math.exp(error))
    assert said.kl_nats == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2)
    assert said.same_best == 0.5


def test_arms_at_different_places_are_refused():
    scores = TextScores([PAIR])
    with pytest.raises(ValueError, match="different places"):
        scores.add({"exact": places([[0.5, 0.5]], [0]), "coarse": places([[0.5, 0.5]], [1])})
    one = places([[0.5, 0.5]], [0])
    with pytest.raises(ValueError, match="shorter"):
        scores.add_all({"exact": [one, one], "coarse": [one]})


def test_greedy_texts_count_up_to_their_first_difference():
    assert greedy_agreement([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 3, 4], [5, 0, 7, 8]]) == GreedyAgreement(5 / 8, 0.5)


def test_what_is_shipped():
    text = shipped_text()
    assert text.startswith("CHAPTER I\n")
    assert len(text) == 22_973
    assert len(set(PROMPTS)) == 20


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_either_way_gives_what_transformers_does(dtype: str, tmp_path: Path) -> None:
    """Every probability, for windows of different lengths and chunks that do not divide them."""
    directory = make_tiny_model(tmp_path / "m")
    loop = EngineLoop(LoopOptions(directory, max_batch=3, max_tokens=150, dtype=dtype))
    text = torch.randint(3, loop.engine.config.vocab_size, (340,), generator=torch.Generator().manual_seed(1)).tolist()
    windows = [text[:150], text[150:300], text[300:]]
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        expected = [reference(torch.tensor([window])).logits[0, :-1].log_softmax(-1) for window in windows]
    tolerance = 1e-4 if dtype == "float32" else 0.5
    seen = [(own.logits.log_softmax(-1), own.tokens) for own in by_prefill(loop.engine, windows, chunk_tokens=37)]
    assert torch.cat([tokens for _, tokens in seen]).tolist() == [token for window in windows for token in window[1:]]
    torch.testing.assert_close(torch.cat([values for values, _ in seen]), torch.cat(expected), rtol=0, atol=tolerance)
    for place, own in enumerate(by_decode(loop.engine, windows)):
        there = [index for index, window in enumerate(windows) if place + 1 < len(window)]
        assert own.tokens.tolist() == [windows[index][place + 1] for index in there]
        wanted = torch.stack([expected[index][place] for index in there])
        torch.testing.assert_close(own.logits.log_softmax(-1), wanted, rtol=0, atol=tolerance)
    assert place == 148


def test_the_command_prints_one_json_object(tmp_path):
    model = str(make_tiny_model(tmp_path / "m"))
    arguments = ("--tokens", "300", "--window", "128", "--output", "4", "--threads", "1", "--dtype", "bfloat16")
    done = CliRunner().invoke(app, ["bench", "accuracy", "--model", model, *arguments, "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["text"] == {"name": "alice.txt", "tokens": 300, "windows": 3, "prompts": 20}
    assert list(result["perplexity"]) == ["float32", "bfloat16", "bfloat16 int8"]
    pairs = {(pair["arm"], pair["reference"]): pair for pair in result["agreement"]}
    assert list(pairs) == [("bfloat16", "float32"), ("bfloat16 int8", "float32"), ("bfloat16 int8", "bfloat16")]
    for way in ("prefill", "decode"):
        near, far = (pairs[arm, "float32"][way]["kl_nats"] for arm in ("bfloat16", "bfloat16 int8"))
        assert 0 < near < far
        for pair in pairs.values():
            ratio = result["perplexity"][pair["arm"]][way] / result["perplexity"][pair["reference"]][way]
            assert pair[way]["perplexity_ratio"] == pytest.approx(ratio, rel=1e-4)


def test_the_command_prints_tables(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    model = str(make_tiny_model(tmp_path / "m"))
    arguments = ("--tokens", "40", "--output", "2", "--dtype", "float32")
    done = CliRunner().invoke(app, ["bench", "accuracy", "--model", model, *arguments])
    assert done.exit_code == 0, done.output
    assert "float32 int8 over float32" in done.stdout
    assert "bfloat16" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--window", "2049"), "window, or prompt and output: 2049 tokens; this model takes 2048"),
        (("--output", "2048"), "this model takes 2048"),
        (("--dtype", "int3"), "dtype must be one of auto"),
        (("--tokens", "1"), "--tokens"),
    ],
)
def test_a_wrong_argument_is_exit_code_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    done = CliRunner().invoke(app, ["bench", "accuracy", "--model", str(make_tiny_model(tmp_path / "m")), *arguments])
    assert done.exit_code == 2
    assert message in done.stderr

"""The whole engine on Triton kernels against the same engine on torch's ops: what is wired wrongly shows here."""

import json

import pytest
import torch

from tailrace.engine.engine import EngineOptions, load_engine
from tailrace.engine.kernels import backend
from tailrace.plan import Chunk, SequenceStart, StepPlan
from tailrace.types import SamplingParams
from tests.helpers.model_files import MISTRAL_CONFIG

pytestmark = pytest.mark.kernels
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
WARM = SamplingParams(temperature=1.5, top_p=0.9, seed=5, ignore_eos=True)
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16, "sliding_window": None}
MODELS = {
    "full": {"sliding_window": None},
    "windowed": {"sliding_window": 9},
    "head norms": QWEN3,
}


def plans():
    """Chunked and mixed steps of three sequences, then decoding of all."""
    long, short = list(range(10, 47)), [5, 6, 7]
    yield StepPlan(started=[SequenceStart(0, long, 37, GREEDY, 0, [3, 1, 4])], chunks=[Chunk(0, 0, 20)])
    yield StepPlan(
        started=[SequenceStart(2, short, 3, WARM, 0, [7, 8]), SequenceStart(1, [9, 8, 50, 3], 4, GREEDY, 0, [0, 11])],
        chunks=[Chunk(0, 20, 37, (0,)), Chunk(2, 0, 3, (0,))],
    )
    yield StepPlan(decode=[2, 0], chunks=[Chunk(1, 0, 4, (0,))])
    for _ in range(3):
        yield StepPlan(decode=[0, 1, 2])


def run(directory):
    options = EngineOptions(
        directory, dtype="float32", block_size=16, num_blocks=20, load_format="dummy", max_num_seqs=3, native=False
    )
    engine = load_engine(options)
    hidden, tokens = [], []
    for plan in plans():
        step = engine.runner.forward(plan)
        hidden.append(step.hidden.clone())
        with torch.inference_mode():
            tokens += engine.runner._draw(step).wait().token_ids
    return hidden, tokens, engine.cache.tensor.clone()


@pytest.mark.parametrize("name", list(MODELS))
def test_kernels_compute_what_torch_computes(name, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({**MISTRAL_CONFIG, **MODELS[name]}))
    expected_hidden, expected_tokens, expected_pool = run(tmp_path)
    launched = set()
    monkeypatch.setattr(backend, "runs_triton", lambda tensor: launched.add(tensor.shape) or True)
    hidden, tokens, pool = run(tmp_path)
    assert launched
    for found, expected in zip(hidden, expected_hidden, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pool, expected_pool, rtol=1e-4, atol=1e-5)
    assert tokens == expected_tokens
    assert len(set(tokens)) > 3

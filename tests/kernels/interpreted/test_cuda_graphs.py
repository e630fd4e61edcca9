"""A step of a graph's size, filled up with rows of nobody, against the step of its own size."""

import json
from dataclasses import replace

import pytest
import torch

from tailrace.engine.batch import BatchState
from tailrace.engine.cuda_graphs import DecodeGraphs
from tailrace.engine.engine import EngineOptions, load_engine
from tailrace.engine.kernels import backend
from tailrace.engine.kernels.kv_write import NO_ROW
from tailrace.engine.kernels.rope_kv_write import kernel as rope_kernel
from tailrace.engine.kernels.rope_kv_write import naive as rope_spec
from tailrace.engine.runner import ModelRunner
from tailrace.engine.sampler import SamplingState
from tailrace.plan import BlockAppend, Chunk, SequenceStart, StepPlan
from tailrace.types import SamplingParams
from tests.helpers.fake_graphs import FakeRecorder
from tests.helpers.kernels import normal, poisoned_memory
from tests.helpers.model_files import MISTRAL_CONFIG

pytestmark = pytest.mark.kernels
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
WARM = SamplingParams(temperature=1.5, top_p=0.9, seed=5, ignore_eos=True)
PENALISED = replace(WARM, repetition_penalty=1.3, logit_bias=((7, 2.0),), logprobs=2)
SLOTS, BLOCKS = 5, 16
OWNED = [3, 1, 4, 7, 0, 11]
MODELS = {
    "full": {"sliding_window": None},
    "windowed": {"sliding_window": 9},
}


@pytest.fixture(autouse=True)
def _forced(monkeypatch):
    monkeypatch.setattr(backend, "runs_triton", lambda tensor: True)


def plans():
    """Three sequences come, one goes, another grows into a new block; batches of 3, 2 and 1 row in changing order."""
    prompts = {0: (list(range(10, 39)), GREEDY, [3, 1]), 2: ([5, 6, 7], WARM, [7]), 4: ([9, 8], PENALISED, [0])}
    for slot, (tokens, sampling, blocks) in prompts.items():
        start = SequenceStart(slot, tokens, len(tokens), sampling, 0, blocks)
        yield StepPlan(started=[start], chunks=[Chunk(slot, 0, len(tokens), (0,))])
    yield from [StepPlan(decode=[0, 2, 4]), StepPlan(decode=[0, 2, 4]), StepPlan(decode=[4, 0])]
    yield StepPlan(appended=[BlockAppend(0, 2, [4])], decode=[0, 2, 4])
    yield from [StepPlan(decode=[0], released=[2]), StepPlan(decode=[4])]
    again = SequenceStart(2, [1, 2, 3, 4], 4, GREEDY, 0, [11])
    yield StepPlan(started=[again], chunks=[Chunk(2, 0, 4, (0,))], decode=[0, 4])
    yield StepPlan(decode=[2, 0, 4])


def run(engine, graphs_of):
    """Tokens, log-probabilities and the pool after `plans`, where the pool was NaN before."""
    model, pool = engine.runner.model, engine.cache.tensor
    pool.fill_(torch.nan)
    batch = BatchState(SLOTS + 1, engine.max_model_len, 16, pool.device)
    sampling = SamplingState(SLOTS, engine.config.vocab_size, (), pool.device)
    with torch.inference_mode():
        runner = ModelRunner(model, engine.cache, batch, sampling, graphs_of(model, batch, pool))
        assert pool.isnan().all()
        outputs = [runner.run(plan) for plan in plans()]
    drawn = [(output.slots, output.positions, output.tokens, output.logprobs, output.bad_rows) for output in outputs]
    return drawn, pool.clone(), batch


@pytest.mark.parametrize("name", list(MODELS))
def test_filled_up_steps_draw_the_same_and_write_nowhere_else(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**MISTRAL_CONFIG, **MODELS[name]}))
    options = {"dtype": "float32", "block_size": 16, "num_blocks": BLOCKS, "load_format": "dummy", "native": False}
    engine = load_engine(EngineOptions(tmp_path, max_num_seqs=SLOTS, max_model_len=96, **options))
    expected, expected_pool, _ = run(engine, lambda *_: None)
    recorder = FakeRecorder()
    with poisoned_memory():
        found, pool, batch = run(engine, lambda *given: DecodeGraphs(*given, [1, 4, 5], recorder))
    assert recorder.replayed == [4, 4, 4, 4, 1, 1, 4]
    assert found == expected
    assert torch.equal(pool.view(torch.int32), expected_pool.view(torch.int32))
    others = [block for block in range(BLOCKS) if block not in OWNED]
    assert pool[others].isnan().all()
    assert not pool[OWNED][:, :, :, :, 0].isnan().any()
    assert batch.lengths[SLOTS] == 0
    assert not batch.tokens[SLOTS].any()


@pytest.mark.parametrize("rope_kv_write", [rope_kernel.rope_kv_write, rope_spec.rope_kv_write])
def test_a_token_of_nobody_is_not_written(rope_kv_write):
    pool = torch.full((3, 2, 2, 2, 16, 16), torch.nan)
    rows = torch.full((3, 4), NO_ROW)
    rows[1] = torch.arange(0, 4 * 16, 16) + 5
    qkv, cos, sin = normal(1, 3, 6, 16), torch.ones(3, 1, 16), torch.zeros(3, 1, 16)
    rope_kv_write(qkv, cos, sin, pool, 1, rows, None)
    written = pool[0, 1, :, :, 5].flatten(0, 1)
    assert torch.equal(written, qkv[1, 2:])
    assert (~pool.isnan()).sum() == written.numel()

"""The sampling kernels against their spec: equal tokens, and bit for bit what it makes of their probabilities."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tailrace.engine import sampler
from tailrace.engine.kernels import backend
from tailrace.engine.kernels.launch import Launch
from tailrace.engine.kernels.sampling import kernel, naive
from tailrace.engine.kernels.sampling.philox import uniforms
from tailrace.engine.sampler import SamplingState
from tailrace.types import SamplingParams
from tests.helpers.kernel_grid import cases
from tests.helpers.kernels import normal, poisoned_memory
from tests.helpers.sampling import EOS, FEATURES, hot, random_row, run

pytestmark = pytest.mark.kernels
TILE = 128


@pytest.fixture(autouse=True)
def _poisoned():
    with poisoned_memory():
        yield


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles to a row, and several chunks to a history, as vocabularies and prompts of real models have them."""
    monkeypatch.setattr(kernel, "_MAX_TILE", TILE)
    monkeypatch.setattr(kernel, "_CHUNK", 4)


@pytest.fixture
def forced(monkeypatch):
    monkeypatch.setattr(backend, "runs_triton", lambda tensor: True)


def both(rows, monkeypatch):
    """What the spec draws, and what the kernels draw."""
    expected = run(rows)
    monkeypatch.setattr(backend, "runs_triton", lambda tensor: True)
    return expected, run(rows)


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.usefixtures("small_tiles")
def test_each_feature(name, monkeypatch):
    rows = [random_row(seed, FEATURES[name]) for seed in range(3)]
    expected, found = both(rows, monkeypatch)
    assert found.token_ids == expected.token_ids
    assert found.bad_rows == ()
    assert found.logprobs == expected.logprobs


@pytest.mark.parametrize(
    ("vocab", "temperature", "top_k", "top_p", "min_p", "penalty", "bias", "min_tokens"),
    cases(
        (127, 128, 200), (0.0, 1.2), (0, 20, 1000), (0.0, 0.7, 1.0), (0.0, 0.05, 1.0), (1.0, 1.3),
        ((), ((2, 3.0), (40, -100.0))), (0, 9),
    ),
)  # fmt: skip
@pytest.mark.usefixtures("small_tiles")
def test_features_together(vocab, temperature, top_k, top_p, min_p, penalty, bias, min_tokens, monkeypatch):
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
        frequency_penalty=penalty - 1,
        logit_bias=bias,
        min_tokens=min_tokens,
    )
    broken = random_row(9, params, vocab)
    broken.logits[vocab - 1] = np.nan
    expected, found = both([random_row(1, params, vocab), broken, random_row(2, params, vocab)], monkeypatch)
    assert found.token_ids == expected.token_ids
    assert found.bad_rows == expected.bad_rows == (1,)


@pytest.mark.parametrize("scale", [0.0, 3.0, 40.0])
@pytest.mark.parametrize("vocab", [1, 300])
def test_bit_for_bit_given_the_probabilities(vocab, scale):
    """Rows of ties among them: logits of bfloat16 from flat to peaked."""
    num = 8
    logits = (normal(vocab, num, vocab) * scale).bfloat16().float()
    state, slots = SamplingState(num, vocab, EOS, "cpu"), torch.arange(num)
    for slot in range(num):
        top_k, top_p, min_p = (0, 5, 50, vocab)[slot % 4], (1.0, 0.3, 0.9)[slot % 3], (0.0, 0.02)[slot % 2]
        state.set(slot, SamplingParams(temperature=0.5 + slot / 8, top_k=top_k, top_p=top_p, min_p=min_p, seed=slot), 1)
    positions, choices = slots + 5, slots % 3
    probs = torch.full((num, vocab), torch.nan)
    token_ids, is_bad = torch.empty(num, dtype=torch.int64), torch.empty(num, dtype=torch.int8)
    kernel.sample_kernel[(num,)](
        token_ids, is_bad, probs, logits, slots, choices, positions, state.floats, state.ints, state.flags,
        logits_stride=vocab, flags_stride=num, VOCAB=vocab, TILE=TILE,
    )  # fmt: skip
    draws = state.flags[0]
    assert not is_bad.any()
    temperature = state.floats[:, 0]
    torch.testing.assert_close(
        probs[draws], naive.probabilities(logits[draws], temperature[draws]), rtol=1e-6, atol=1e-40
    )
    uniform = uniforms(state.ints[:, :2], choices, positions)
    for row in draws.nonzero().flatten().tolist():
        kept = probs[row : row + 1].clone()
        naive.mask_min_p(kept, state.floats[row : row + 1, 2])
        if state.ints[row, 2] > 0:
            naive.mask_top_k(kept, state.ints[row : row + 1, 2])
        naive.mask_top_p(kept, state.floats[row : row + 1, 1])
        assert token_ids[row] == naive.draw(kept, uniform[row : row + 1])[0]
    assert token_ids[~draws].tolist() == logits[~draws].argmax(dim=-1).tolist()


@pytest.mark.usefixtures("forced", "small_tiles")
def test_the_uniforms_are_the_specs():
    """Of a flat row the token is the uniform itself; seeds, choices and positions take all their bits."""
    seeds = [0, 1, (1 << 64) - 1, 0x123456789ABCDEF0]
    state = SamplingState(len(seeds), 1 << 10, (), "cpu")
    for slot, seed in enumerate(seeds):
        state.set(slot, SamplingParams(seed=seed), 1)
    slots = torch.arange(len(seeds)).repeat(2)
    choices, positions = torch.arange(8) // 4 * 1000, torch.arange(8) * 90_001 + 1
    logits, tokens = torch.zeros(8, 1 << 10), torch.zeros(len(seeds), 8, dtype=torch.int32)
    found, _ = sampler.draw_tokens(logits, state, slots, choices, positions, tokens)
    expected = uniforms(state.ints[slots, :2], choices, positions) * (1 << 10)
    assert found.tolist() == expected.long().tolist()


@pytest.mark.usefixtures("forced")
def test_no_rows():
    state, none = SamplingState(2, 10, EOS, "cpu"), torch.zeros(0, dtype=torch.int64)
    tokens = torch.zeros(2, 8, dtype=torch.int32)
    state.set(0, FEATURES["everything"], 1)
    token_ids, is_bad = sampler.draw_tokens(torch.zeros(0, 10), state, none, none, none, tokens)
    assert token_ids.shape == is_bad.shape == (0,)


@pytest.mark.usefixtures("forced", "small_tiles")
def test_ties_and_edges():
    assert run([hot([1, 5, 2, 5, 5, 0], temperature=0.0)] * 2).token_ids == [1, 1]
    for params in ({"top_k": 2}, {"top_p": 0.4}, {"min_p": 1.0}):
        rows = [hot([0, 3, 3, 3, 1], seed=seed, **params) for seed in range(16)]
        assert set(run(rows).token_ids) == {1, 2, 3}
    only = np.full((3, 5), -np.inf)
    np.fill_diagonal(only, 0.0)
    assert run([hot(row.tolist(), seed=7) for row in only], eos=()).token_ids == [0, 1, 2]
    flat = [hot([-np.inf, 2.0, 900.0, -np.inf], temperature=np.inf, seed=seed) for seed in range(12)]
    assert set(run(flat).token_ids) == {1, 2}


@pytest.mark.usefixtures("forced", "small_tiles")
def test_bad_rows_are_flagged_and_leave_the_others_alone():
    good = random_row(1, FEATURES["everything"])
    alone = run([good]).token_ids
    nan, infinite, nothing = (replace(good, logits=good.logits.copy()) for _ in range(3))
    nan.logits[7], infinite.logits[199] = np.nan, np.inf
    nothing.logits[:] = -np.inf
    result = run([nan, good, infinite, nothing])
    assert result.bad_rows == (0, 2, 3)
    assert result.token_ids == [0, *alone, 0, 0]


def test_tiles_and_warps_follow_the_vocabulary():
    assert kernel.sample_launch(100) == Launch({"VOCAB": 100, "TILE": 128}, 1, fuses_products=False)
    assert kernel.sample_launch(151_936) == Launch({"VOCAB": 151_936, "TILE": 8192}, 16, fuses_products=False)

"""The sampler against a naive one, its distribution, its independence of the batch, and its edges."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tailrace.engine.kernels.sampling.naive import draw, largest, mask_top_p, probabilities
from tailrace.engine.kernels.sampling.philox import philox4x32, uniforms
from tailrace.engine.sampler import SamplingState, sample
from tailrace.types import SamplingParams
from tests.helpers import naive_sampler
from tests.helpers.sampling import EOS, FEATURES, hot, random_row, run


@pytest.mark.parametrize("name", FEATURES)
def test_each_feature_draws_what_the_naive_sampler_draws(name: str) -> None:
    rows = [random_row(seed, FEATURES[name]) for seed in range(64)]
    assert run(rows).token_ids == [naive_sampler.draw(row, EOS) for row in rows]


def test_rows_with_different_features_share_a_batch() -> None:
    rows = [random_row(seed, params) for seed, params in enumerate(list(FEATURES.values()) * 3)]
    assert run(rows).token_ids == [naive_sampler.draw(row, EOS) for row in rows]


def test_the_naive_sampler_is_exercised() -> None:
    """Guards the comparisons above: each feature changes at least one of the tokens they compare."""
    plain = {name: SamplingParams(temperature=params.temperature) for name, params in FEATURES.items()}
    for name in FEATURES.keys() - {"greedy", "temperature", "hot", "top_k_beyond_vocabulary"}:
        pairs = [(random_row(seed, FEATURES[name]), random_row(seed, plain[name])) for seed in range(64)]
        assert any(naive_sampler.draw(one, EOS) != naive_sampler.draw(other, EOS) for one, other in pairs), name


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert philox4x32(torch.tensor([counter]), torch.tensor([key])).tolist() == [expected]
    assert list(naive_sampler.philox4x32(tuple(counter), tuple(key))) == expected


def test_each_part_of_the_key_decides() -> None:
    seeds = [0, 1, 1 << 32, (1 << 64) - 1]
    keys = list(itertools.product(seeds, [0, 1], [1, 2, 100_000]))
    drawn = uniforms(
        torch.tensor([[seed & 0xFFFFFFFF, seed >> 32] for seed, _, _ in keys]),
        torch.tensor([choice for _, choice, _ in keys]),
        torch.tensor([position for _, _, position in keys]),
    )
    assert drawn.tolist() == [naive_sampler.uniform(*key) for key in keys]
    assert len(set(drawn.tolist())) == len(keys)
    assert 0 <= float(drawn.min()) <= float(drawn.max()) < 1


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.8), SamplingParams(temperature=1.5, top_p=0.9)])
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    """Pearson's chi-square over 40,000 positions; the bound is five standard deviations above its mean."""
    num, vocab = 40_000, 40
    row = replace(random_row(5, params, vocab), prompt=[0], output=[])
    state = SamplingState(1, vocab, (), "cpu")
    state.set(0, replace(params, seed=1234), 1)
    logits = torch.tensor(row.logits, dtype=torch.float32).expand(num, -1)
    zeros = torch.zeros(num, dtype=torch.int64)
    drawn = sample(
        logits, state, zeros, zeros, torch.arange(1, num + 1), torch.zeros(1, 8, dtype=torch.int32), [0] * num
    ).wait()
    expected = naive_sampler.distribution(row) * num
    observed = np.bincount(drawn.token_ids, minlength=vocab)
    possible = expected > 0
    assert observed[~possible].sum() == 0
    statistic = float((((observed - expected) ** 2)[possible] / expected[possible]).sum())
    freedom = int(possible.sum()) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("vocab", [1003, 49_152])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_row_is_drawn_alike_alone_and_in_any_batch(vocab: int, num_threads: int) -> None:
    rows = [random_row(seed, list(FEATURES.values())[seed % len(FEATURES)], vocab) for seed in range(2, 18)]
    rows = [replace(row, params=replace(row.params, logprobs=index % 4)) for index, row in enumerate(rows)]
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        together, backwards, alone = run(rows), run(rows[::-1]), [run([row]) for row in rows]
    finally:
        torch.set_num_threads(threads)
    tokens = [result.token_ids[0] for result in alone]
    assert together.token_ids == tokens
    assert backwards.token_ids == tokens[::-1]
    assert together.logprobs is not None
    assert backwards.logprobs is not None
    single = [result.logprobs[0] for result in alone if result.logprobs is not None]
    assert together.logprobs == single
    assert backwards.logprobs == single[::-1]


def test_probabilities_are_bit_equal_alone_and_in_a_batch() -> None:
    """Tokens can agree by luck; what they are drawn from must not differ in a bit, whatever the row length."""
    for vocab in (1000, 1001, 1007, 4099):
        logits = torch.randn(16, vocab, generator=torch.Generator().manual_seed(vocab)) * 3
        temperature = torch.linspace(0.2, 2.0, 16)
        together = probabilities(logits, temperature)
        for row in range(16):
            assert torch.equal(
                together[row : row + 1], probabilities(logits[row : row + 1], temperature[row : row + 1])
            )


def test_choices_of_one_slot_are_drawn_apart() -> None:
    state = SamplingState(4, 1000, (), "cpu")
    state.set(2, SamplingParams(temperature=1.0, seed=9), 3)
    slots, positions = torch.full((64,), 2), torch.full((64,), 3)
    drawn = sample(
        torch.zeros(64, 1000), state, slots, torch.arange(64), positions, torch.zeros(4, 8, dtype=torch.int32), [2] * 64
    ).wait()
    expected = [int(naive_sampler.uniform(9, choice, 3) * 1000) for choice in range(64)]
    assert drawn.token_ids == expected


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    assert run([hot([1, 5, 2, 5, 5, 0], temperature=0.0)] * 3).token_ids == [1, 1, 1]


@pytest.mark.parametrize("vocab", [1, 7, 1003, 49_152])
def test_the_largest_is_found_as_torch_finds_it(vocab: int) -> None:
    """Many ties, rows of one value, NaN, and infinities of both signs."""
    rng = torch.Generator().manual_seed(vocab)
    logits = torch.randint(-3, 3, (12, vocab), generator=rng).float()
    logits[3] = -torch.inf
    logits[4, vocab // 2] = torch.inf
    logits[5, vocab // 3] = torch.nan
    logits[6] = torch.nan
    for given in (logits, logits[::2], logits.T.contiguous().T, logits[:0]):
        values, ids = largest(given)
        if len(given):
            expected = given.max(dim=-1)
            assert ids.tolist() == expected.indices.tolist()
            assert torch.equal(values.nan_to_num(9.0), expected.values.nan_to_num(9.0))
        assert len(ids) == len(values) == len(given)


def test_top_k_of_one_is_greedy_even_in_a_tie() -> None:
    rows = [hot([1, 5, 2, 5, 5, 0], temperature=2.0, top_k=1, seed=seed) for seed in range(20)]
    assert set(run(rows).token_ids) == {1}


def test_tokens_tied_with_the_last_one_kept_stay() -> None:
    kept = {
        tuple(sorted(set(run([hot([0, 3, 3, 3, 1], seed=seed, **params) for seed in range(60)]).token_ids)))
        for params in ({"top_k": 2}, {"top_p": 0.4}, {"min_p": 1.0})
    }
    assert kept == {(1, 2, 3)}


def test_top_p_of_a_flat_row() -> None:
    rows = [random_row(seed, SamplingParams(temperature=30.0, top_p=0.93), vocab=5000) for seed in range(40)]
    assert run(rows).token_ids == [naive_sampler.draw(row, EOS) for row in rows]


@pytest.mark.parametrize("temperature", [1e-40, 1e-30, 1e-5])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    rows = [random_row(seed, SamplingParams(temperature=temperature)) for seed in range(20)]
    assert run(rows).token_ids == [int(row.logits.argmax()) for row in rows]


@pytest.mark.parametrize("temperature", [1e20, 1e38, math.inf])
def test_a_huge_temperature_is_flat_over_what_is_not_masked(temperature: float) -> None:
    rows = [hot([-math.inf, 2.0, 900.0, -math.inf], temperature=temperature, seed=seed) for seed in range(40)]
    assert set(run(rows).token_ids) == {1, 2}


@pytest.mark.parametrize("params", [{"top_p": 1e-9}, {"top_p": 0.0}, {"min_p": 1.0}])
def test_the_tightest_bounds_leave_the_most_likely_token(params: dict[str, float]) -> None:
    rows = [random_row(seed, SamplingParams(**params)) for seed in range(20)]  # type: ignore[arg-type]
    assert run(rows).token_ids == [int(row.logits.argmax()) for row in rows]


def test_the_only_unmasked_token_is_drawn_wherever_it_is() -> None:
    logits = np.full((5, 5), -math.inf)
    np.fill_diagonal(logits, 0.0)
    rows = [hot(row.tolist(), seed=seed) for row in logits for seed in range(8)]
    assert run(rows, eos=()).token_ids == [index for index in range(5) for _ in range(8)]


def test_the_largest_uniform_never_draws_a_masked_token() -> None:
    probs = torch.softmax(torch.randn(200, 77, generator=torch.Generator().manual_seed(0)), dim=-1)
    probs[:, 60:] = 0
    probs[:, :4] = 0
    last = draw(probs, torch.full((200,), 1 - 2.0**-53, dtype=torch.float64))
    first = draw(probs, torch.zeros(200, dtype=torch.float64))
    assert set(last.tolist()) == {59}
    assert set(first.tolist()) == {4}


def test_rows_that_cannot_be_drawn_from_are_named_and_leave_the_others_alone() -> None:
    good = [random_row(seed, params) for seed, params in enumerate(FEATURES.values())]
    rows = list(good)
    nan, infinite, nothing = (replace(good[0], logits=good[0].logits.copy()) for _ in range(3))
    nan.logits[7], infinite.logits[7] = math.nan, math.inf
    nothing.logits[:] = -math.inf
    sampled = replace(nan, params=FEATURES["everything"])
    for index, row in ((0, nan), (3, infinite), (5, nothing), (9, sampled)):
        rows.insert(index, row)
    result = run(rows)
    assert result.bad_rows == (0, 3, 5, 9)
    drawn = [token for index, token in enumerate(result.token_ids) if index not in result.bad_rows]
    assert drawn == [naive_sampler.draw(row, EOS) for row in good]
    assert result.logprobs is not None
    assert result.logprobs[9] is None


def test_a_bias_that_forbids_everything_is_reported() -> None:
    everything = tuple((token, -math.inf) for token in range(6))
    rows = [
        replace(hot([0.0] * 6), params=SamplingParams(logit_bias=everything)),
        hot([0.0] * 5 + [50.0], temperature=1.0),
    ]
    result = run(rows, eos=())
    assert result.bad_rows == (0,)
    assert result.token_ids == [0, 5]


def test_logprobs_are_of_the_raw_distribution() -> None:
    params = SamplingParams(temperature=0.3, repetition_penalty=1.5, logit_bias=((4, 50.0),), top_k=3, logprobs=5)
    row = random_row(4, params)
    result = run([row, random_row(5, SamplingParams()), replace(row, params=replace(params, logprobs=0))])
    assert result.logprobs is not None
    entry, unasked, only_chosen = result.logprobs
    raw = row.logits - row.logits.max() - math.log(np.exp(row.logits - row.logits.max()).sum())
    assert entry is not None
    assert entry.logprob == pytest.approx(raw[4], abs=1e-5)
    assert [token for token, _ in entry.top] == np.argsort(-raw)[:5].tolist()
    assert [value for _, value in entry.top] == pytest.approx(sorted(raw, reverse=True)[:5], abs=1e-5)
    assert unasked is None
    assert only_chosen is not None
    assert only_chosen.top == ()
    assert only_chosen.logprob == entry.logprob


def test_of_equally_likely_tokens_the_lower_ids_are_reported_first() -> None:
    logits = [0.0, 2.0, 1.0, 2.0, 1.0, 1.0, -3.0, 1.0]
    counts = [1, 3, 4, 8]
    result = run([hot(logits, temperature=0.0, logprobs=count) for count in counts])
    assert result.logprobs is not None
    order = [1, 3, 2, 4, 5, 7, 0, 6]
    assert [[token for token, _ in entry.top] for entry in result.logprobs if entry] == [order[:n] for n in counts]


def test_no_row_asked_for_logprobs() -> None:
    assert run([hot([0.0, 1.0])]).logprobs is None


def test_ids_beyond_the_vocabulary_have_no_effect() -> None:
    params = SamplingParams(temperature=0.0, logit_bias=((9, 100.0), (-1, 100.0)), min_tokens=2, stop_token_ids=(8, -4))
    row = replace(hot([0.0, 3.0, 1.0]), params=params)
    assert run([row], eos=(77,)).token_ids == [1]


def test_a_slot_forgets_who_had_it_before() -> None:
    state = SamplingState(2, 50, (), "cpu")
    logits = torch.tensor(random_row(1, SamplingParams(), 50).logits, dtype=torch.float32)[None]
    one, tokens = torch.tensor([1]), torch.zeros(2, 8, dtype=torch.int32)
    for params in FEATURES.values():
        kept = [entry for entry in params.logit_bias if entry[0] < 50]
        state.set(1, replace(params, logit_bias=(*kept, (20, 500.0))), 1)
        state.clear(1)
    assert sample(logits, state, one, one, one, tokens, [1]).wait().token_ids == [int(logits.argmax())]
    state.set(1, SamplingParams(temperature=0.0), 1)
    assert sample(logits, state, one, one, one, tokens, [1]).wait().token_ids == [int(logits.argmax())]
    assert not any(state.uses(feature) for feature in state._users)


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 5.0, 40.0])
def test_top_p_keeps_what_sorting_would_keep(scale: float) -> None:
    """From flat rows, ties included, to rows of one likely token; probabilities down to denormal and zero."""
    generator = torch.Generator().manual_seed(round(scale * 10))
    logits = (torch.randn(24, 3000, generator=generator) * scale).bfloat16().float()
    top_p = torch.rand(24, generator=generator)
    probs = torch.softmax(logits, dim=-1)
    masked = probs.clone()
    mask_top_p(masked, top_p)
    for row, bound, kept in zip(probs.double().numpy(), top_p.double().numpy(), masked, strict=True):
        falling = np.sort(row)[::-1]
        needed = int((np.cumsum(falling) < bound * row.sum()).sum())
        assert torch.equal(kept.nonzero().flatten(), torch.tensor(row >= falling[needed]).nonzero().flatten())
        assert torch.equal(kept[kept > 0].double(), torch.tensor(row[row >= falling[needed]]))

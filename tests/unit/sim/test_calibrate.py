import dataclasses

import pytest

from tailrace.sim.calibrate import DecodeSample, FetchSample, PrefillSample, calibrated, with_decode, with_fetches
from tailrace.sim.profile import PROFILES

BASE = PROFILES["cpu"]
KINDS = ((0, 32), (0, 128), (0, 700), (0, 2000), (512, 576), (1024, 1280), (1984, 2048))


def samples_of(profile) -> list[PrefillSample]:
    return [PrefillSample(*kind, profile.prefill_s(*kind)) for kind in KINDS]


def test_what_a_profile_predicts_gives_the_profile_back():
    truth = dataclasses.replace(
        BASE,
        flops_per_s=1.3e12,
        attention_flops_per_s=0.2e12,
        context_s_per_token=9e-6,
        prefill_overhead_s=0.004,
    )
    found = calibrated(BASE, samples_of(truth))
    for name in ("flops_per_s", "attention_flops_per_s", "context_s_per_token", "prefill_overhead_s"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=1e-6), name
    assert found.prefill_s(300, 1500) == pytest.approx(truth.prefill_s(300, 1500))


def test_no_cost_is_negative():
    truth = dataclasses.replace(BASE, attention_flops_per_s=float("inf"), context_s_per_token=0.0)
    bent = [dataclasses.replace(s, seconds=s.seconds * (1 - s.prompt_tokens / 20_000)) for s in samples_of(truth)]
    found = calibrated(BASE, bent)
    assert found.attention_flops_per_s > 0.0
    assert found.context_s_per_token >= 0.0
    assert found.prefill_s(0, 4000) >= found.prefill_s(0, 2000) > 0.0


def test_too_few_kinds_or_no_growth_are_refused():
    with pytest.raises(ValueError, match="4 lengths at least are needed, got 1"):
        calibrated(BASE, [PrefillSample(0, 64, 0.1)] * 9)
    falling = [PrefillSample(0, 16 * i, 1.0 / i**3) for i in range(1, 9)]
    with pytest.raises(ValueError, match="no longer with more tokens"):
        calibrated(BASE, falling)


def test_a_fetch_has_a_fixed_cost_and_a_rate():
    found = with_fetches(BASE, [FetchSample(n, 0.011 + n / 4e9) for n in (10**6, 10**7, 3 * 10**7)])
    assert found.fetch_overhead_s == pytest.approx(0.011)
    assert found.link_bytes_per_s == pytest.approx(4e9)
    noisy = with_fetches(BASE, [FetchSample(10**6, 0.012), FetchSample(10**7, 0.011)])
    assert noisy.fetch_overhead_s > 0.0
    assert noisy.link_bytes_per_s == BASE.link_bytes_per_s, "bytes that cost nothing say nothing of the link"
    with pytest.raises(ValueError, match="2 lengths"):
        with_fetches(BASE, [FetchSample(10**6, 0.012)] * 3)


BATCHES = ((1, 76), (1, 1548), (4, 304), (8, 608))


def test_batches_give_the_decode_step_back():
    truth = dataclasses.replace(BASE, weight_bytes=200e6, memory_bytes_per_s=20e9, step_per_row_s=0.0004)
    samples = [
        DecodeSample(rows, context, truth.step_base_s + truth.step_per_row_s * rows + truth.step_per_token_s * context)
        for rows, context in BATCHES
    ]
    found = with_decode(BASE, samples)
    for name in ("step_base_s", "step_per_row_s", "step_per_token_s"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=1e-6), name
    flat = with_decode(BASE, [dataclasses.replace(sample, seconds=0.01) for sample in samples])
    assert flat.step_base_s == pytest.approx(0.01)
    assert flat.step_per_token_s == pytest.approx(BASE.step_per_token_s), "not told from noise: as before"
    with pytest.raises(ValueError, match="batches of 3 kinds"):
        with_decode(BASE, samples[:2])

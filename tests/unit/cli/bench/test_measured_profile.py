from itertools import accumulate
from types import SimpleNamespace

import pytest

from tailrace.cli.bench.load import RequestTimes
from tailrace.cli.bench.measured_profile import BATCHES, DECODED_TOKENS, SETTLED_TOKENS, ProfileMeter
from tailrace.cli.bench.replay import Served
from tailrace.config import UpConfig

ABOUT = SimpleNamespace(
    max_position_embeddings=8192, vocab_size=100, num_layers=30, hidden_size=576, num_kv_heads=3, head_dim=64
)
HANDOFF_S = 0.02


def answer(step_s: float, num_others: int) -> RequestTimes:
    """Slow until the others have come."""
    early = [5 * step_s] * num_others
    gaps = [HANDOFF_S + step_s, *early, *[step_s] * (DECODED_TOKENS - 2 - num_others)]
    return RequestTimes(0.0, chunks_at=list(accumulate(gaps, initial=1.0)))


def test_decode_steps_are_those_of_a_whole_batch_and_a_handoff_that_of_one():
    meter = ProfileMeter(None, "m", UpConfig(prefill=2), ABOUT)
    alone = [Served(length, 0, 0, 0.1 + length / 1e3, length / 1e3, 0, 1.0, 1) for length in (32, 64, 512, 2048)]
    meter._rounds.append(alone)
    for length, count in BATCHES:
        context = count * (length + DECODED_TOKENS - SETTLED_TOKENS // 2)
        step_s = 0.010 + 0.0005 * count + 2e-6 * context
        meter._add_decode(length, [answer(step_s, count - 1) for _ in range(count)])
    profile = meter.result().profile
    assert profile.step_base_s == pytest.approx(0.010)
    assert profile.step_per_row_s == pytest.approx(0.0005)
    assert profile.step_per_token_s == pytest.approx(2e-6)
    assert profile.handoff_overhead_s == pytest.approx(HANDOFF_S)

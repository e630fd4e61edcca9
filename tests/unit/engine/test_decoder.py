"""The parts of the decoder that parity with another implementation does not pin down."""

import math

import pytest
import torch

from tailrace.checkpoint.rope_config import RopeConfig
from tailrace.engine.models.decoder import refine_best
from tailrace.engine.models.rotary import frequencies, rotary_table


def test_ties_of_rounded_logits_are_broken_by_the_true_product() -> None:
    head = torch.tensor([[8.0, 8.0], [8.0, 8.0625], [1.0, 1.0], [8.0, 7.9375]]).bfloat16()
    normed = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).bfloat16()
    logits = (normed @ head.T).float()
    assert logits[0, 0] == logits[0, 1]
    refine_best(logits, normed, head)
    assert logits[0].tolist() == [16.0, 16.0625, 2.0, 15.9375]
    assert logits[1].tolist() == [0.0] * 4


def test_logits_far_from_the_best_stay_as_they_are() -> None:
    head = torch.tensor([[8.0], [3.0]]).bfloat16()
    logits = torch.tensor([[8.0, 5.0]])
    refine_best(logits, torch.ones(1, 1).bfloat16(), head)
    assert logits.tolist() == [[8.0, 5.0]]


def test_rows_that_cannot_be_drawn_from_stay_so() -> None:
    logits = torch.tensor([[math.nan, 1.0], [math.inf, 1.0]])
    refine_best(logits, torch.ones(2, 1).bfloat16(), torch.ones(2, 1).bfloat16())
    assert logits[0, 0].isnan()
    assert logits[1, 0].isinf()


@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_frequencies_by_hand(kind: str) -> None:
    rope = RopeConfig(10000.0, kind, 8.0, 1.0, 4.0, 64)
    for index, found in enumerate(frequencies(rope, 8).tolist()):
        plain = 10000.0 ** (-2 * index / 8)
        turns = 64 * plain / (2 * math.pi)
        share = min(max((turns - 1) / 3, 0.0), 1.0)
        slowed = {"default": plain, "linear": plain / 8, "llama3": share * plain + (1 - share) * plain / 8}
        assert found == pytest.approx(slowed[kind], rel=1e-6)


def test_rotary_table_has_the_form_that_the_op_takes() -> None:
    table = rotary_table(RopeConfig(10000.0), 8, 5, torch.device("cpu"))
    assert table.cos.shape == table.sin.shape == (5, 1, 8)
    assert torch.equal(table.sin[..., :4], -table.sin[..., 4:])
    assert table.cos[3, 0, 0] == pytest.approx(math.cos(3.0))

"""Weights of 8 bits: an int8 for each input, times a float32 for each output."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tailrace.engine.models.linear import Linear, LinearMaker

QUANTIZATIONS = ("none", "int8")
HEAD_SHARE = 2**-4
"""Of a row's best logit. Logits of a rounded head that are no further from it are computed again from the head's own
weights: rounding moves a logit by less than that, and so does not decide between the likeliest tokens."""
_GREATEST = 127
_UNIT = 128
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class RoundedWeight:
    values: Tensor
    """[outputs, inputs] int8, -127 to 127"""
    scales: Tensor
    """[outputs] float32: the weight is scales[:, None] * values."""


def round_weight(weight: Tensor) -> RoundedWeight:
    """weight: [outputs, inputs]. The greatest of each row becomes 127 or -127; halves go to even."""
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = weight.abs().amax(1).float() / _GREATEST
    divisors = scales.where(scales > 0, 1.0)[:, None]
    for first in range(0, len(weight), _ROWS_AT_ONCE):
        own = slice(first, first + _ROWS_AT_ONCE)
        values[own] = (weight[own].float() / divisors[own]).round_().clamp_(-_GREATEST, _GREATEST)
    return RoundedWeight(values, scales)


class RoundedLinear:
    """The product with a rounded weight in torch's operations: nothing but the weight is rounded.

    The weight is a multiple of 1/128 between -1 and 1, which is exact in every dtype that is served, and so takes as
    much memory as one that was not rounded.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, make: LinearMaker) -> None:
        rounded = round_weight(weight)
        self._product: Linear = make(rounded.values.to(weight.dtype).div_(_UNIT), None)
        self._scales = rounded.scales * _UNIT
        self._bias = None if bias is None else bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        out = self._product(x).float().mul_(self._scales)
        return (out if self._bias is None else out.add_(self._bias)).to(x.dtype)

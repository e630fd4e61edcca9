"""Tables of cosines and sines for rotary position embedding."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tailrace.checkpoint.rope_config import RopeConfig


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """What kernels.rope takes, for every position."""

    cos: Tensor
    """[positions, 1, head_dim] float32, both halves alike."""
    sin: Tensor
    """[positions, 1, head_dim] float32, the first half negated."""


def rotary_table(rope: RopeConfig, head_dim: int, num_positions: int, device: torch.device) -> RotaryTable:
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies(rope, head_dim))
    cos, sin = angles.cos(), angles.sin()
    return RotaryTable(
        torch.cat((cos, cos), dim=-1).unsqueeze(1).to(device), torch.cat((-sin, sin), dim=-1).unsqueeze(1).to(device)
    )


def frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """[head_dim / 2] float32, radians a position."""
    plain = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.kind == "linear":
        return plain / rope.factor
    return _llama3(rope, plain) if rope.kind == "llama3" else plain


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    """Llama 3.1's rule: long waves are slowed by `factor`, short ones kept, those between blended by wavelength."""
    turns = rope.original_max_position * plain / (2 * math.pi)
    share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    share = share.clamp(0.0, 1.0)
    return (1 - share) * plain / rope.factor + share * plain

"""Shazeer, "GLU Variants Improve Transformer" (2020)."""

import torch.nn.functional as F
from torch import Tensor


def silu_mul(
    gate_up: Tensor,  # [tokens, 2 * size]: gates, then values
) -> Tensor:  # [tokens, size]
    """silu(gate) * up"""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)

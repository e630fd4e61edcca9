"""Zhang & Sennrich, "Root Mean Square Layer Normalization" (2019)."""

import torch
from torch import Tensor


def rms_norm(
    x: Tensor,  # [..., size], of the weight's dtype or wider
    weight: Tensor,  # [size]
    eps: float,
) -> Tensor:  # [..., size], the weight's dtype
    """x / sqrt(mean(x^2) + eps) * weight; the mean in float32, whatever the dtype."""
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    return (wide * inverse).to(weight.dtype).mul_(weight)


def add_rms_norm(
    hidden: Tensor,  # [rows, size], changed in place: the sum
    delta: Tensor,  # [rows, size]
    weight: Tensor,  # [size]
    eps: float,
) -> Tensor:  # [rows, size], the weight's dtype
    """hidden += delta, and the norm of the sum."""
    hidden += delta
    return rms_norm(hidden, weight, eps)

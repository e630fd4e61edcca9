"""Zhang & Sennrich, "Root Mean Square Layer Normalization" (2019)."""

import torch
from torch import Tensor


def rms_norm(
    x: Tensor,  # [..., size]
    weight: Tensor,  # [size]
    eps: float,
) -> Tensor:  # [..., size], x's dtype
    """x / sqrt(mean(x^2) + eps) * weight; the mean in float32, whatever the dtype."""
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    return (wide * inverse).to(x.dtype).mul_(weight)

"""Su et al., "RoFormer" (2021), with Hugging Face's pairing: dimension i turns with dimension i + head_dim / 2."""

from torch import Tensor


def rope_(
    x: Tensor,  # [tokens, heads, head_dim], changed in place
    cos: Tensor,  # [tokens, 1, head_dim] float32, both halves alike
    sin: Tensor,  # [tokens, 1, head_dim] float32, the first half negated
) -> None:
    """Turns each pair of dimensions by its token's angle; computed in float32."""
    half = x.shape[-1] // 2
    turned = x * cos
    turned.addcmul_(x.view(*x.shape[:-1], 2, half).flip(-2).flatten(-2), sin)
    x.copy_(turned)

"""Philox4x32-10: a random number as a pure function of a counter and a key, for all rows at once.

Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
"""

import torch
from torch import Tensor

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_LOW_32 = 0xFFFFFFFF


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """`counter` [R, 4] and `key` [R, 2] to [R, 4]; all int64 holding unsigned 32-bit words."""
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(_ROUNDS):
        high_0, low_0 = _multiply(_MULTIPLIER_0, c0)
        high_1, low_1 = _multiply(_MULTIPLIER_1, c2)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _WEYL_0) & _LOW_32, (k1 + _WEYL_1) & _LOW_32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _multiply(constant: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of an unsigned product: int64 wraps to its 64 bits, the mask drops copies of the sign."""
    product = words * constant
    return (product >> 32) & _LOW_32, product & _LOW_32


def uniforms(seeds: Tensor, choices: Tensor, positions: Tensor) -> Tensor:
    """One float64 in [0, 1) a row, a multiple of 2**-53, keyed by (seed, choice, position).

    `seeds` [R, 2] int64: low and high 32 bits; `choices` and `positions` [R] int64, below 2**32. The seed is the key,
    (position, choice, 0, 0) the counter.
    """
    zeros = torch.zeros_like(positions)
    words = philox4x32(torch.stack((positions, choices, zeros, zeros), dim=-1), seeds)
    bits = ((words[:, 0] >> 5) << 26) | (words[:, 1] >> 6)
    return bits.double() * 2.0**-53

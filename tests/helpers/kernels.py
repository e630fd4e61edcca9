"""Inputs for kernel tests, and memory that shows what was never written."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, torch fills every uninitialized floating-point tensor with NaN: an unwritten element cannot pass."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def kv_pool(
    lengths: Sequence[int], kv_heads: int, head_dim: int, dtype: torch.dtype, *, block: int
) -> tuple[Tensor, Tensor]:
    """A pool of three layers and scattered tables for rows of these lengths; entries past a row's own are out of range.

    Blocks of nobody are NaN: reading one shows. What follows a row's last token in its last block is large, not NaN: a
    pool holds whatever was there, and it is always finite.
    """
    counts = [-(-length // block) for length in lengths]
    num_blocks = sum(counts) + 5
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
    tables = torch.full((len(lengths), max(counts) + 3), num_blocks + 1000, dtype=torch.int32)
    pool = torch.full((num_blocks, 3, 2, kv_heads, block, head_dim), torch.nan, dtype=dtype)
    for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        own = [order.pop() for _ in range(count)]
        tables[row, :count] = torch.tensor(own, dtype=torch.int32)
        pool[own] = normal(row, count, 3, 2, kv_heads, block, head_dim, dtype=dtype)
        if own:
            pool[own[-1], ..., (length - 1) % block + 1 :, :] = 1e4
    return pool, tables


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """`expected` in a wider dtype; the tolerance is that of `actual`'s, and NaN is never close."""
    tolerance = _TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)

"""Attention of one new token a sequence over its cached blocks.

A step prepares `DecodeRows` once for each kind of layer (full, windowed); every layer of the kind uses them.
"""

from typing import Protocol

from torch import Tensor

from tailrace.engine.kernels import backend
from tailrace.engine.kernels.attention_decode import gathered

__all__ = ["DecodeRows", "attention_decode", "decode_rows"]


class DecodeRows(Protocol):
    """The decode rows of one step, for one kind of layer, as the implementation that was picked wants them."""

    def attend(self, query: Tensor, pool: Tensor, layer: int) -> Tensor: ...


def decode_rows(pool: Tensor, tables: Tensor, lengths: Tensor, host_lengths: list[int], window: int) -> DecodeRows:
    """As gathered.decode_rows."""
    if backend.runs_triton(pool):
        from tailrace.engine.kernels.attention_decode import kernel

        return kernel.paged_rows(pool, tables, lengths, window)
    return gathered.decode_rows(pool, tables, lengths, host_lengths, window)


def attention_decode(query: Tensor, pool: Tensor, layer: int, rows: DecodeRows) -> Tensor:
    """As naive.attention_decode."""
    return rows.attend(query, pool, layer)

"""Attention of chunks of new tokens over the cached ones before them and themselves.

A step prepares a `ChunkSpan` for a chunk, or for all its chunks, and kind of layer (full, windowed); every layer of the
kind uses it.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from tailrace.engine.kernels import backend
from tailrace.engine.kernels.attention_prefill import gathered

__all__ = ["ChunkSpan", "attention_prefill", "chunk_span", "joins_chunks", "joint_span"]


class ChunkSpan(Protocol):
    """Chunks of one step, for one kind of layer, as the implementation that was picked wants them."""

    def attend(self, query: Tensor, keys_values: Tensor, pool: Tensor, layer: int) -> Tensor: ...


def joins_chunks(pool: Tensor) -> bool:
    """Whether all chunks of a step go into one `joint_span`, rather than each into its own `chunk_span`."""
    return backend.runs_triton(pool)


def joint_span(pool: Tensor, tables: Tensor, ranges: Sequence[tuple[int, int]], window: int) -> ChunkSpan:
    """As kernel.paged_span; for pools that `joins_chunks` is true of."""
    from tailrace.engine.kernels.attention_prefill import kernel

    return kernel.paged_span(pool, tables, ranges, window)


def chunk_span(pool: Tensor, table: Tensor, start: int, end: int, window: int) -> ChunkSpan:
    """As gathered.chunk_span."""
    if joins_chunks(pool):
        return joint_span(pool, table.unsqueeze(0), [(start, end)], window)
    return gathered.chunk_span(pool, table, start, end, window)


def attention_prefill(query: Tensor, keys_values: Tensor, pool: Tensor, layer: int, span: ChunkSpan) -> Tensor:
    """As naive.attention_prefill, for each chunk of the span."""
    return span.attend(query, keys_values, pool, layer)

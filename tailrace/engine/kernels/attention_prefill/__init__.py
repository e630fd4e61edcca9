"""Attention of a chunk of new tokens over the cached ones before it and itself.

A step prepares one `ChunkSpan` for each chunk and kind of layer (full, windowed); every layer of the kind uses it.
"""

from tailrace.engine.kernels.attention_prefill.gathered import ChunkSpan, attention_prefill, chunk_span

__all__ = ["ChunkSpan", "attention_prefill", "chunk_span"]

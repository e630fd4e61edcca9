"""Rotary position embedding, in place."""

from tailrace.engine.kernels.rope.naive import rope_

__all__ = ["rope_"]

"""Root-mean-square normalization over the last dimension."""

from tailrace.engine.kernels.rms_norm.naive import rms_norm

__all__ = ["rms_norm"]

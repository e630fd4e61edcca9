"""Writing the keys and values of new tokens into their blocks."""

from tailrace.engine.kernels.kv_write.naive import NO_ROW, kv_write, write_rows

__all__ = ["NO_ROW", "kv_write", "write_rows"]

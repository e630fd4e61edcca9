"""Writing the keys and values of new tokens into their blocks."""

from tailrace.engine.kernels.kv_write.naive import kv_write, write_rows

__all__ = ["kv_write", "write_rows"]

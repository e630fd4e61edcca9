"""The index that gateways keep."""

from functools import cache

from tailrace.checkpoint.cache_dir import default_cache_dir
from tailrace.index.compact import DEFAULT_LIMITS, CompactIndex, Functions, IndexLimits, load_functions


@cache
def functions() -> Functions:
    return load_functions(default_cache_dir())


def compact_index(limits: IndexLimits = DEFAULT_LIMITS, **sizes: int) -> CompactIndex:
    return CompactIndex(functions(), limits, **sizes)

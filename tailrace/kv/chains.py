"""Block hashes of prompts, for whoever hashes many: compiled, or in Python with a memory of what was hashed before."""

import ctypes
import logging
from collections.abc import Callable, Sequence
from ctypes import c_char_p, c_int64, py_object
from pathlib import Path
from typing import Protocol

from tailrace.compiler import NativeUnavailableError, Source
from tailrace.kv.chain_memo import ChainMemo
from tailrace.kv.hashing import HASH_BYTES, hash_blocks

_log = logging.getLogger(__name__)
_SOURCE = Source("chain", Path(__file__).parent / "native" / "chain.c", ("-std=gnu11", "-O2"))


class Chains(Protocol):
    """`hashing.hash_blocks`, of whole chains."""

    def hash_blocks(self, tokens: Sequence[int], block_size: int, seed: bytes) -> list[bytes]:
        """Hashes of the full blocks of `tokens`. Raises ValueError for token ids outside uint32."""
        ...


def open_chains(cache_dir: Path) -> Chains:
    """The compiled one; where it cannot be compiled one in Python, with a warning."""
    try:
        return NativeChains(cache_dir)
    except NativeUnavailableError as error:
        _log.warning("prompts are hashed in Python, at several times the time: %s", error)
        return ChainMemo()


class NativeChains:
    """A chain in one call, which remembers nothing: hashing takes less than looking up. Mirrors native/chain.c."""

    def __init__(self, cache_dir: Path) -> None:
        """Raises NativeUnavailableError where it cannot be compiled."""
        # It keeps the interpreter's lock: it reads and makes Python's objects.
        function = _SOURCE.load(ctypes.PyDLL, cache_dir).tailrace_chain_hash
        function.argtypes, function.restype = (py_object, c_int64, c_int64, c_char_p), py_object
        self._hash: Callable[[list[int], int, int, bytes], list[bytes]] = function

    def hash_blocks(self, tokens: Sequence[int], block_size: int, seed: bytes) -> list[bytes]:
        """Hashes of the full blocks of `tokens`. `seed`: as `chain_seed` makes them.

        Raises ValueError for token ids outside uint32, a block_size below 1 and a seed of another length.
        """
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {block_size}")
        if len(seed) != HASH_BYTES:
            raise ValueError(f"seed must have {HASH_BYTES} bytes, not {len(seed)}")
        listed = tokens if isinstance(tokens, list) else list(tokens)
        try:
            return self._hash(listed, len(listed) // block_size, block_size, seed)
        except (OverflowError, TypeError):
            # It takes whatever can be an index, and says what is wrong with what cannot.
            return hash_blocks(listed, block_size, seed)

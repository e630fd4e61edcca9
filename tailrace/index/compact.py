"""The prefix index as a compiled table of fingerprints: what a gateway keeps. Mirrors native/index.c.

An entry is a fingerprint, the first 8 of a hash's 16 bytes, and its holder: 12 bytes, and 14 with the gaps. Two blocks
with one fingerprint are one block here, which costs a miss at the owner: every read of a block is by its whole hash.
Among n blocks a block that nobody holds is taken for one of them with odds of n in 2**64: 5e-13 for ten million.

A dropped worker is marked, and lookups pass over what it had; its entries go as events of others come by.
"""

import ctypes
import logging
import weakref
from array import array
from collections.abc import Callable, Iterable, Sequence
from ctypes import c_char_p, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass, replace
from pathlib import Path

from tailrace.compiler import NativeUnavailableError, Source
from tailrace.index.local import LocalIndex
from tailrace.index.memory import MemoryIndex
from tailrace.index.prefix_index import IndexStats, PrefixHit, PrefixIndex
from tailrace.kv.events import KVEvent, KVEvents, Tier
from tailrace.kv.hashing import HASH_BYTES

_log = logging.getLogger(__name__)
_SOURCE = Source("index", Path(__file__).parent / "native" / "index.c", ("-std=gnu11", "-O2"))
_PARTITION_BITS = 10
_FINGERPRINT_BITS = 64
_FOUND_WORDS = 2 + len(Tier)
"""Holder, leading blocks, and how many of them on each tier."""
_MOST = (1 << 32) - 1
MAX_WORKERS = 1 << 16
FIXED_BYTES = 4 << 20
BYTES_A_BLOCK = 18
"""A holder, at worst, beside FIXED_BYTES: with 8 holders each, and arrays that have just grown. Alone 14 or 15."""


@dataclass(frozen=True, slots=True)
class IndexLimits:
    """Blocks beyond either are not taken up; the publisher's earlier ones, a prefix's beginning, stay."""

    blocks_per_worker: int = 1 << 23
    blocks: int = 1 << 25
    """Of all workers; a block counts once for each that holds it."""

    @classmethod
    def of_memory(cls, num_bytes: int, blocks_per_worker: int) -> "IndexLimits":
        """So many blocks of all workers that a CompactIndex stays within `num_bytes`, which are above FIXED_BYTES."""
        return cls(blocks_per_worker, max(1, min(_MOST, (num_bytes - FIXED_BYTES) // BYTES_A_BLOCK)))

    def __post_init__(self) -> None:
        for name in ("blocks_per_worker", "blocks"):
            if not 1 <= getattr(self, name) <= _MOST:
                raise ValueError(f"{name} must be between 1 and {_MOST}, not {getattr(self, name)}")


DEFAULT_LIMITS = IndexLimits()


class Functions:
    """The compiled functions. They keep the interpreter's lock: nothing in them waits."""

    def __init__(self, library: ctypes.PyDLL) -> None:
        self.new = library.tailrace_index_new
        self.new.argtypes, self.new.restype = (c_uint32, c_uint32, c_uint64), c_void_p
        self.free = library.tailrace_index_free
        self.free.argtypes, self.free.restype = (c_void_p,), None
        self.admit = library.tailrace_index_admit
        self.admit.argtypes, self.admit.restype = (c_void_p, c_uint32), c_int64
        self.drop = library.tailrace_index_drop
        self.drop.argtypes, self.drop.restype = (c_void_p, c_uint32), None
        self.apply = library.tailrace_index_apply
        self.apply.argtypes, self.apply.restype = (c_void_p, c_uint32, c_char_p, c_char_p, c_int64), c_uint64
        self.search = library.tailrace_index_search
        self.walk = library.tailrace_index_walk
        for lookup in (self.search, self.walk):
            lookup.argtypes, lookup.restype = (c_void_p, c_char_p, c_int64, c_void_p), c_uint32
        self.runs = library.tailrace_index_runs
        self.runs.argtypes, self.runs.restype = (*self.walk.argtypes, c_uint32), c_uint32
        self.num_blocks = library.tailrace_index_num_blocks
        self.num_blocks.argtypes, self.num_blocks.restype = (c_void_p, c_uint32), c_uint32
        self.stats = library.tailrace_index_stats
        self.stats.argtypes, self.stats.restype = (c_void_p, c_void_p), None
        self.check = library.tailrace_index_check
        self.check.argtypes, self.check.restype = (c_void_p,), c_int32


def load_functions(cache_dir: Path) -> Functions:
    """Raises NativeUnavailableError where they cannot be compiled."""
    return Functions(_SOURCE.load(ctypes.PyDLL, cache_dir))


def open_index(cache_dir: Path, limits: IndexLimits = DEFAULT_LIMITS) -> PrefixIndex:
    """The compact index; where it cannot be compiled the one in Python, with a warning."""
    try:
        return CompactIndex(load_functions(cache_dir), limits)
    except NativeUnavailableError as error:
        _log.warning("the prefix index is kept in Python, at many times the memory and time: %s", error)
        return MemoryIndex(limits.blocks_per_worker)


class CompactIndex(LocalIndex):
    """Used by one thread. `partition_bits` and `fingerprint_bits` are lowered by tests.

    Raises MemoryError where there is none for an empty table.
    """

    def __init__(
        self,
        functions: Functions,
        limits: IndexLimits = DEFAULT_LIMITS,
        *,
        partition_bits: int = _PARTITION_BITS,
        fingerprint_bits: int = _FINGERPRINT_BITS,
    ) -> None:
        super().__init__(limits.blocks_per_worker)
        self._functions = functions
        self._table: int | None = functions.new(partition_bits, fingerprint_bits, limits.blocks)
        if not self._table:
            raise MemoryError("no memory for an index")
        weakref.finalize(self, functions.free, self._table)
        self._limits = limits
        self._found = array("I")
        self._has_warned = False

    def __repr__(self) -> str:
        return f"<CompactIndex {self._held()}>"

    def stats(self) -> IndexStats:
        counts = array("Q", bytes(8 * 6))
        self._functions.stats(self._table, counts.buffer_info()[0])
        return replace(IndexStats(*counts), num_lookups=self.num_lookups)

    def check_integrity(self) -> None:
        """Recomputes every count and the order of all entries. Raises AssertionError where they disagree."""
        if code := self._functions.check(self._table):
            raise AssertionError(f"prefix index: finding {code} of native/check.h")

    # -- what is asked ------------------------------------------------------------------------------------------------

    def longest_prefix(self, hashes: Sequence[bytes]) -> dict[str, int]:
        """By a binary search for each holder, in which those go together that agree so far.

        Blocks that were not probed are taken to be there, between two that are: where a hint is missing in the middle,
        more may be counted than `longest_prefix_by_tier` does. Raises ValueError for hashes of another length.
        """
        rows, ids = self._look_up(self._functions.search, hashes), self._ids
        return {ids[holder]: depth for holder, depth in zip(rows[::_FOUND_WORDS], rows[1::_FOUND_WORDS], strict=True)}

    def longest_prefix_by_tier(self, hashes: Sequence[bytes]) -> dict[str, PrefixHit]:
        """Reads every block, up to the first missing one. Raises ValueError for hashes of another length."""
        return self._hits(self._look_up(self._functions.walk, hashes))

    def deepest_runs(self, hashes: Sequence[bytes], span: int) -> dict[str, PrefixHit]:
        """Reads every block. Raises ValueError for hashes of another length."""
        return self._hits(self._look_up(self._functions.runs, hashes, span))

    def _hits(self, rows: "array[int]") -> dict[str, PrefixHit]:
        return {
            self._ids[rows[at]]: PrefixHit(rows[at + 1], tuple(rows[at + 2 : at + _FOUND_WORDS]))
            for at in range(0, len(rows), _FOUND_WORDS)
        }

    def _look_up(self, lookup: Callable[..., int], hashes: Sequence[bytes], *options: int) -> "array[int]":
        self.num_lookups += 1
        packed = b"".join(hashes)
        if len(packed) != HASH_BYTES * len(hashes):
            raise ValueError(f"{len(hashes)} hashes have {len(packed)} bytes; a block hash has {HASH_BYTES}")
        found = self._found
        num_found = lookup(self._table, packed, len(hashes), found.buffer_info()[0], *options)
        return found[: num_found * _FOUND_WORDS]

    # -- the table ----------------------------------------------------------------------------------------------------

    def _admit(self, max_blocks: int) -> int:
        """Raises ValueError beyond MAX_WORKERS, those included whose blocks have not been swept away."""
        holder: int = self._functions.admit(self._table, max_blocks)
        if holder < 0:
            raise ValueError(f"the prefix index has no room for another worker; at most {MAX_WORKERS}")
        self._found.extend([0] * (_FOUND_WORDS * (len(self._ids) + 1) - len(self._found)))
        return holder

    def _drop(self, holder: int) -> None:
        self._functions.drop(self._table, holder)

    def _count(self, holder: int) -> int:
        count: int = self._functions.num_blocks(self._table, holder)
        return count

    def _change(self, holder: int, events: Sequence[KVEvent]) -> None:
        columns = KVEvents.of(events)
        if self._functions.apply(self._table, holder, columns.kinds, columns.hashes, len(columns)):
            self._warn_of_limit(holder)

    def _warn_of_limit(self, holder: int) -> None:
        if not self._has_warned:
            self._has_warned = True
            _log.warning(
                "the prefix index takes up no more blocks of %s: %d of its own, at most %d; %d of all, at most %d",
                self._ids[holder],
                self._count(holder),
                self._limits.blocks_per_worker,
                self.stats().num_held,
                self._limits.blocks,
            )

    def _publish(self, holder: int, hashes: Iterable[bytes], tier: Tier) -> None:
        self._change(holder, KVEvents.published(list(hashes), tier))

    def _retract(self, holder: int, hashes: Iterable[bytes]) -> None:
        self._change(holder, KVEvents.retracted(list(hashes)))

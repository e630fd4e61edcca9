"""`tailrace bench tiers`: what the store's tiers put and get a second, and what the disk tier is worth in hits.

Rates: the same bytes go, by turns, through the memory tier beside memcpy by one thread, and through the disk tier
beside one thread of plain pwrite and pread on a file made alike in the same directory. Hits: the store's own code
decides over small blocks, with a working set of twice the memory tier, once with a disk tier that holds all of it and
once without.
"""

import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tailrace.cli.bench.report import Spread, header, print_footer
from tailrace.cli.bench.run import show
from tailrace.cli.bench.tier_hits import HitOptions, measure_hits
from tailrace.errors import ConfigError
from tailrace.host_memory import map_memory
from tailrace.kv.layout import KVLayout, LayerGroup
from tailrace.kvstore.slab_file import open_slab
from tailrace.kvstore.store import KvStore

CHAIN = 16
"""Blocks of one loan."""
_ROOM = 3
"""Slots for each block of a turn, so that the blocks of the rounds before are what is given up. As many rounds are for
warming up: the first write of a slot is slower, and so is the first touch of memory."""
_TIMEOUT_S = 30.0
RATIOS = {
    "memory_put": "memcpy",
    "memory_get": "memcpy",
    "disk_put": "pwrite",
    "disk_get": "pread",
}


@dataclass(frozen=True, slots=True)
class TierOptions:
    directory: str = ""
    """Where the files are made; empty: the system's directory for temporary files."""
    block_bytes: tuple[int, ...] = (65_536, 368_640, 1_048_576)
    total_bytes: int = 128 << 20
    """Moved in each turn, but at least 256 blocks."""
    rounds: int = 5


def run_tiers(options: TierOptions, hits: HitOptions, *, as_json: bool) -> None:
    """Prints a table, or one JSON object on stdout. Raises ConfigError for a size that no block has, OSError."""
    head = header("tiers", packages=("tailrace", "numpy"))
    result = {**head, "options": {**asdict(options), "hits": asdict(hits)}}
    with tempfile.TemporaryDirectory(dir=options.directory or None, prefix="tailrace-tiers-") as directory:
        result["sizes"] = {str(size): _measure(Path(directory), size, options) for size in options.block_bytes}
        result["hits"] = measure_hits(Path(directory), hits)
    show(result, _print, as_json=as_json)


def layout_of(block_bytes: int) -> KVLayout:
    """A layout whose blocks have this size. Raises ConfigError."""
    if block_bytes % 64 or block_bytes < 64:
        raise ConfigError(f"block_bytes: a multiple of 64 is needed, not {block_bytes}", param="block_bytes")
    return KVLayout(
        model_digest="benchmark",
        weights_digest="",
        quantization="none",
        numerics_version=1,
        num_layers=1,
        num_kv_heads=1,
        head_dim=block_bytes // 64,
        block_size=16,
        kv_dtype="bfloat16",
        groups=(LayerGroup("full", (0,)),),
    )


class _Bench:
    """One size of blocks. Each arm moves all blocks once, and takes how long that took."""

    def __init__(self, directory: Path, block_bytes: int, num_blocks: int) -> None:
        layout = layout_of(block_bytes)
        self._size, self._num = block_bytes, num_blocks
        self._path = directory / f"plain-{block_bytes}"
        self._plain = _plain_file(self._path, block_bytes * num_blocks)
        self._source = map_memory(block_bytes * num_blocks)
        self._target = map_memory(block_bytes * num_blocks)
        np.frombuffer(self._source, dtype=np.uint64)[:] = np.random.default_rng(0).integers(
            1 << 63, size=block_bytes * num_blocks // 8, dtype=np.uint64
        )
        self._in_memory = KvStore(block_bytes, _ROOM * num_blocks)
        self._on_disk = KvStore(block_bytes, max(4 * CHAIN, num_blocks // 8))
        self._slab_path = directory / f"slab-{block_bytes}"
        self._on_disk.open_disk(open_slab(self._slab_path, _ROOM * num_blocks, layout), lambda: None)
        self._round = 0
        self.arms: dict[str, Callable[[], None]] = {
            "memcpy": self._memcpy,
            "memory_put": lambda: self._put(self._in_memory),
            "memory_get": lambda: self._get(self._in_memory, self._num, copy=True),
            "pwrite": lambda: self._each(os.pwritev, self._source),
            "disk_put": lambda: self._put(self._on_disk),
            "pread": lambda: self._each(os.preadv, self._target),
            "disk_get": self._get_from_disk,
        }

    def next_round(self) -> None:
        self._round += 1

    def close(self) -> None:
        os.close(self._plain)
        self._path.unlink()
        self._on_disk.close()
        self._slab_path.unlink()

    @property
    def is_direct(self) -> bool:
        return self._on_disk.disk is not None and self._on_disk.disk.file.is_direct

    def _memcpy(self) -> None:
        with memoryview(self._source) as source, memoryview(self._target) as target:
            for block in range(self._num):
                start = block * self._size
                target[start : start + self._size] = source[start : start + self._size]

    def _each(self, call: Callable[[int, Sequence[memoryview], int], int], memory: mmap.mmap) -> None:
        with memoryview(memory) as view:
            for block in range(self._num):
                start = block * self._size
                if call(self._plain, [view[start : start + self._size]], start) != self._size:
                    raise OSError("a plain read or write was short")

    def _chains(self, num_blocks: int) -> Iterator[tuple[int, list[bytes]]]:
        """(first block, names); other names in every round, so that nothing is there already."""
        for first in range(0, num_blocks, CHAIN):
            blocks = range(first, min(first + CHAIN, num_blocks))
            yield first, [self._round.to_bytes(8, "little") + block.to_bytes(8, "little") for block in blocks]

    def _put(self, store: KvStore) -> None:
        """As a peer's blocks arrive: into the slots of the memory tier; and on to the disk, where there is one."""
        with memoryview(self._source) as source:
            for first, names in self._chains(self._num):
                arrivals = store.reserve(store.wanted(names))
                for index, arrival in enumerate(arrivals, start=first):
                    store.slot_bytes(arrival.slot)[:] = source[index * self._size : (index + 1) * self._size]
                store.landed(arrivals)
                while store.num_unwritten > CHAIN:
                    store.pump(_TIMEOUT_S)
        store.flush(_TIMEOUT_S)

    def num_moved(self, arm: str) -> int:
        """Blocks. What was put last is still in memory, so only the first half is got from disk."""
        return self._num // 2 if arm == "disk_get" else self._num

    def _get_from_disk(self) -> None:
        before = self._on_disk.counters.hits_memory
        self._get(self._on_disk, self._num // 2, copy=False)
        if self._on_disk.counters.hits_memory != before:
            raise AssertionError("blocks that should come from disk were in memory")

    def _get(self, store: KvStore, num_blocks: int, *, copy: bool) -> None:
        """As a peer borrows: from the memory tier, whose bytes it copies; from the disk, until they are in memory."""
        num_got = 0
        with memoryview(self._target) as target:
            for first, names in self._chains(num_blocks):
                loan = store.borrow(names)
                while True:
                    for lent in loan.take_ready():
                        num_got += 1
                        if copy:
                            start = (first + lent.index) * self._size
                            target[start : start + self._size] = store.slot_bytes(lent.slot)
                    if loan.is_complete:
                        break
                    store.pump(_TIMEOUT_S)
                loan.close()
        if num_got != num_blocks:
            raise AssertionError(f"{num_got} of {num_blocks} blocks were got")


def _measure(directory: Path, block_bytes: int, options: TierOptions) -> dict[str, Any]:
    num_blocks = max(16 * CHAIN, options.total_bytes // block_bytes // CHAIN * CHAIN)
    with _opened(directory, block_bytes, num_blocks) as bench:
        seconds: dict[str, list[float]] = {name: [] for name in bench.arms}
        for number in range(_ROOM + options.rounds):
            bench.next_round()
            for name, arm in bench.arms.items():
                started = time.perf_counter()
                arm()
                if number:  # the first round is for warming up
                    seconds[name].append(time.perf_counter() - started)
        direct = bench.is_direct
    moved = {name: bench.num_moved(name) * block_bytes for name in seconds}
    return {
        "num_blocks": num_blocks,
        "o_direct": direct,
        "gb_per_s": {
            name: asdict(Spread.of([moved[name] / s / 1e9 for s in times])) for name, times in seconds.items()
        },
        **{
            f"{name}_over_{limit}": asdict(
                Spread.of(
                    [
                        moved[name] / own / (moved[limit] / bare)
                        for own, bare in zip(seconds[name], seconds[limit], strict=True)
                    ],
                    digits=3,
                )
            )
            for name, limit in RATIOS.items()
        },
    }


@contextmanager
def _opened(directory: Path, block_bytes: int, num_blocks: int) -> Iterator[_Bench]:
    bench = _Bench(directory, block_bytes, num_blocks)
    try:
        yield bench
    finally:
        bench.close()


def _plain_file(path: Path, num_bytes: int) -> int:
    """Opened as the store opens its own: past the page cache where the file system can."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    except OSError:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.posix_fallocate(fd, 0, num_bytes)
    return fd


def _print(result: dict[str, Any]) -> None:
    console = Console()
    arms = list(next(iter(result["sizes"].values()))["gb_per_s"])
    table = Table(title=f"{result['options']['total_bytes'] >> 20} MiB a turn; GB/s: median (min-max)")
    table.add_column("")
    for size in result["sizes"]:
        table.add_column(f"blocks of {int(size):,} B", justify="right")
    for name in arms:
        table.add_row(name, *(str(Spread(**found["gb_per_s"][name])) for found in result["sizes"].values()))
    for name, limit in RATIOS.items():
        key = f"{name}_over_{limit}"
        table.add_row(f"{name} over {limit}", *(f"{found[key]['median']:.2f}" for found in result["sizes"].values()))
    console.print(table)
    hits = Table(title="hit rate, a working set of twice the memory tier")
    names = ("memory", "memory_and_disk", "ideal", "ratio", "ceiling")
    for column in ("pattern", "memory", "memory + disk", "ideal memory", "ratio", "ceiling"):
        hits.add_column(column, justify="right")
    for pattern, found in result["hits"].items():
        hits.add_row(pattern, *(f"{found[name]:.2f}" for name in names))
    console.print(hits)
    print_footer(console, result)

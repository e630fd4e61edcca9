"""`tailrace bench index`: lookups, events and memory of the gateway's prefix index, beside the one in plain Python.

Workers hold prompts of 750 blocks (12,000 tokens in blocks of 16), each on one of them; one prompt more is held by
all. Hashes are random bytes, as those of blocks are. A lookup finds every block that it asks for, which is the longest
way, and its hashes have just been made, as the gateway's have. Events come in batches of what a step of 512 prompt
tokens says on a full pool: 32 retractions and 32 publications.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from tailrace.checkpoint.cache_dir import default_cache_dir
from tailrace.cli.bench.report import Percentiles, Spread, header, print_footer
from tailrace.cli.bench.run import show
from tailrace.errors import UnavailableError
from tailrace.index.compact import CompactIndex, load_functions
from tailrace.index.memory import MemoryIndex
from tailrace.index.prefix_index import PrefixIndex
from tailrace.kv.events import KVEvent, KVEventKind, KVEvents
from tailrace.kv.hashing import HASH_BYTES
from tailrace.messages import KvEventBatch
from tailrace.rpc import convert

PROMPT_BLOCKS = 750
LENGTHS = (24, PROMPT_BLOCKS)
BATCH_EVENTS = 64
NAIVE_MAX_BLOCKS = 2_000_000
"""Beyond, the index in plain Python would take gigabytes."""
_EPOCH = 1
_SHARED = 1 << 40
"""The prompt that all workers hold."""


@dataclass(frozen=True, slots=True)
class IndexBenchOptions:
    blocks: tuple[int, ...] = (1_000_000, 10_000_000)
    """One index each."""
    workers: int = 64
    lookups: int = 2000
    """Of each length."""
    rounds: int = 5
    """Turns of events."""
    batches: int = 2000
    """Of one turn."""


@dataclass(slots=True)
class Arm:
    """One index and what was measured of it."""

    index: PrefixIndex
    reads_columns: bool
    lookups_us: dict[str, list[float]] = field(default_factory=dict)
    events_per_s: list[float] = field(default_factory=list)
    wire_events_per_s: list[float] = field(default_factory=list)
    rss_bytes: int = 0
    build_s: float = 0.0
    longest_apply_s: float = 0.0
    """While it grew: the longest call of all."""
    sequences: dict[str, int] = field(default_factory=dict)

    def apply(self, worker: int, events: Sequence[KVEvent]) -> float:
        """Seconds."""
        worker_id = name(worker)
        first = self.sequences.get(worker_id, 0)
        began = time.perf_counter()
        is_applied = self.index.apply(worker_id, _EPOCH, first, events)
        took = time.perf_counter() - began
        assert is_applied
        self.sequences[worker_id] = first + len(events)
        return took


def run_index(options: IndexBenchOptions, *, as_json: bool) -> None:
    """Prints a table, or one JSON object on stdout. Raises NativeUnavailableError without a C compiler."""
    head = header("index", packages=("tailrace", "protobuf"))
    # All are kept to the end: what one gave back, another would take without the process growing.
    sizes = [(blocks, measure(options, blocks)) for blocks in sorted(options.blocks, reverse=True)]
    result = {
        **head,
        "options": asdict(options),
        "sizes": [summary(blocks, arms) for blocks, arms in reversed(sizes)],
    }
    show(result, _print, as_json=as_json)


def measure(options: IndexBenchOptions, blocks: int) -> dict[str, Arm]:
    arms = {"compact": Arm(CompactIndex(load_functions(default_cache_dir())), reads_columns=True)}
    if blocks <= NAIVE_MAX_BLOCKS:
        arms["naive"] = Arm(MemoryIndex(blocks), reads_columns=False)
    for arm in arms.values():
        _build(arm, options, blocks)
    num_prompts = blocks // PROMPT_BLOCKS
    for length in LENGTHS:
        _look_up(arms, f"{length}", [(number, length) for number in _some(num_prompts, options.lookups)], options)
    by_tier = [(number, PROMPT_BLOCKS) for number in _some(num_prompts, options.lookups)]
    _look_up(arms, f"{PROMPT_BLOCKS} by tier", by_tier, options)
    _look_up(arms, f"{PROMPT_BLOCKS} shared", [(_SHARED, PROMPT_BLOCKS)] * max(1, options.lookups // 10), options)
    for turn in range(options.rounds):
        _turn_of_events(arms, options, num_prompts, turn)
    return arms


# -- prompts ----------------------------------------------------------------------------------------------------------


def name(worker: int) -> str:
    return f"worker-{worker}"


def prompt(number: int) -> bytes:
    """Its hashes, one after the other."""
    return random.Random(number).randbytes(PROMPT_BLOCKS * HASH_BYTES)  # noqa: S311 - content, not a secret


def split(hashes: bytes, length: int) -> list[bytes]:
    return [hashes[at : at + HASH_BYTES] for at in range(0, length * HASH_BYTES, HASH_BYTES)]


def _some(num_prompts: int, count: int) -> list[int]:
    return random.Random(0).choices(range(num_prompts), k=count)  # noqa: S311


def _batches(number: int) -> Iterator[KVEvents]:
    hashes = prompt(number)
    for at in range(0, PROMPT_BLOCKS, BATCH_EVENTS):
        piece = hashes[at * HASH_BYTES : (at + BATCH_EVENTS) * HASH_BYTES]
        yield KVEvents(bytes((KVEventKind.PUBLISH,)) * (len(piece) // HASH_BYTES), piece)


# -- what is measured -------------------------------------------------------------------------------------------------


def _build(arm: Arm, options: IndexBenchOptions, blocks: int) -> None:
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    for number in range(blocks // PROMPT_BLOCKS):
        for events in _batches(number):
            took = arm.apply(number % options.workers, events)
            arm.build_s += took
            arm.longest_apply_s = max(arm.longest_apply_s, took)
    gc.collect()
    arm.rss_bytes = process.memory_info().rss - before
    for worker in range(options.workers):
        for events in _batches(_SHARED):
            arm.apply(worker, events)


def _look_up(arms: dict[str, Arm], what: str, asked: list[tuple[int, int]], options: IndexBenchOptions) -> None:
    """By turns. Raises UnavailableError for a wrong answer."""
    for number, length in asked:
        holders = range(options.workers) if number == _SHARED else (number % options.workers,)
        expected = {name(worker): length for worker in holders}
        packed = prompt(number)
        for arm_name in _in_turn(arms, number):
            arm = arms[arm_name]
            hashes = split(packed, length)
            ask = arm.index.longest_prefix_by_tier if what.endswith("by tier") else arm.index.longest_prefix
            began = time.perf_counter()
            found = ask(hashes)
            took = time.perf_counter() - began
            if {worker: hit if isinstance(hit, int) else hit.num_blocks for worker, hit in found.items()} != expected:
                raise UnavailableError(f"the {arm_name} index found {len(found)} holders of prompt {number}")
            arm.lookups_us.setdefault(what, []).append(took * 1e6)


def _turn_of_events(arms: dict[str, Arm], options: IndexBenchOptions, num_prompts: int, turn: int) -> None:
    """Each batch drops blocks of an old prompt of its worker, and takes up as many of a new one."""
    batches = list(_churn(options, num_prompts, turn))
    for arm_name in _in_turn(arms, turn):
        arm = arms[arm_name]
        told: list[Sequence[KVEvent]] = [events if arm.reads_columns else list(events) for _, events in batches]
        took = sum(arm.apply(worker, events) for (worker, _), events in zip(batches, told, strict=True))
        arm.events_per_s.append(len(batches) * BATCH_EVENTS / took)
        if arm.reads_columns:
            back = [(worker, KVEvents(_swapped(events.kinds), events.hashes)) for worker, events in batches]
            arm.wire_events_per_s.append(_from_the_wire(arm, back))
            for worker, events in batches:
                arm.apply(worker, events)


def _churn(options: IndexBenchOptions, num_prompts: int, turn: int) -> Iterator[tuple[int, KVEvents]]:
    """Batch n drops the first 32 blocks of prompt n: in time, of one that an earlier batch took up."""
    kinds = bytes((KVEventKind.RETRACT, KVEventKind.PUBLISH)) * (BATCH_EVENTS // 2)
    first = turn * options.batches
    for old in range(first, first + options.batches):
        gone, come = (split(prompt(number), BATCH_EVENTS // 2) for number in (old, old + num_prompts))
        pairs = zip(gone, come, strict=True)
        yield old % num_prompts % options.workers, KVEvents(kinds, b"".join(b"".join(pair) for pair in pairs))


def _swapped(kinds: bytes) -> bytes:
    return kinds.translate(bytes.maketrans(b"\1\2", b"\2\1"))


def _from_the_wire(arm: Arm, batches: list[tuple[int, KVEvents]]) -> float:
    """Events a second, from a message's bytes to the index."""
    messages = [convert.kv_events_to_proto(KvEventBatch(_EPOCH, 0, events)) for _, events in batches]
    parse: Callable[[bytes], Any] = type(messages[0]).FromString
    wires = [message.SerializeToString() for message in messages]
    took = 0.0
    for (worker, _), wire in zip(batches, wires, strict=True):
        began = time.perf_counter()
        events = convert.kv_events_from_proto(parse(wire)).events
        took += time.perf_counter() - began + arm.apply(worker, events)
    return len(batches) * BATCH_EVENTS / took


def _in_turn(arms: dict[str, Arm], turn: int) -> list[str]:
    names = list(arms)
    return names[turn % len(names) :] + names[: turn % len(names)]


# -- what is said -----------------------------------------------------------------------------------------------------


def summary(blocks: int, arms: dict[str, Arm]) -> dict[str, Any]:
    said: dict[str, Any] = {"blocks": blocks, **{arm_name: _summary_of(blocks, arm) for arm_name, arm in arms.items()}}
    if naive := arms.get("naive"):
        compact = arms["compact"]
        said["compact_over_naive"] = {
            "lookup_p50": {
                what: round(statistics.median(times) / statistics.median(naive.lookups_us[what]), 3)
                for what, times in compact.lookups_us.items()
            },
            "events_per_s": round(statistics.median(compact.events_per_s) / statistics.median(naive.events_per_s), 2),
            "bytes_a_block": round(compact.rss_bytes / max(1, naive.rss_bytes), 4),
        }
    return said


def _summary_of(blocks: int, arm: Arm) -> dict[str, Any]:
    said: dict[str, Any] = {
        "lookup_us": {what: asdict(Percentiles.of(times)) for what, times in arm.lookups_us.items()},
        "events_per_s": asdict(Spread.of(arm.events_per_s, digits=0)),
        "bytes_a_block": round(arm.rss_bytes / blocks, 1),
        "growing_events_per_s": round(blocks / arm.build_s),
        "longest_apply_ms": round(arm.longest_apply_s * 1e3, 3),
    }
    if arm.wire_events_per_s:
        said["events_per_s_from_the_wire"] = asdict(Spread.of(arm.wire_events_per_s, digits=0))
    return said


def _print(result: dict[str, Any]) -> None:
    console = Console()
    for size in result["sizes"]:
        arms = [arm for arm in ("compact", "naive") if arm in size]
        table = Table("", *arms, title=f"{size['blocks']:,} blocks of {result['options']['workers']} workers")
        for what in size["compact"]["lookup_us"]:
            times = [str(Percentiles(**size[arm]["lookup_us"][what])) for arm in arms]
            table.add_row(f"lookup of {what} blocks, us: p50 / p90 / p99", *times)
        table.add_row("events/s", *(f"{size[arm]['events_per_s']['median']:,.0f}" for arm in arms))
        table.add_row("bytes a block", *(f"{size[arm]['bytes_a_block']:.1f}" for arm in arms))
        table.add_row("longest batch while growing, ms", *(f"{size[arm]['longest_apply_ms']:.3f}" for arm in arms))
        console.print(table)
    print_footer(console, result)

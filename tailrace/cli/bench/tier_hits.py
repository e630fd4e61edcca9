"""The hit rate of a store with a disk tier over one without, on access patterns of conversations.

A conversation is a chain of blocks; a request asks for all of its chain, and what was not found is put afterwards, as
after a prefill. Blocks found over blocks asked for, from when every conversation has been there once.

A disk that holds all can find all, so `ceiling`, 1 over what memory finds, is the most that any disk tier can reach.
`ideal` is what memory alone would find if it knew the future.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tailrace.kv.layout import KVLayout, LayerGroup
from tailrace.kvstore.slab_file import open_slab
from tailrace.kvstore.store import KvStore

_TIMEOUT_S = 30.0
_ZIPF = 0.8


@dataclass(frozen=True, slots=True)
class HitOptions:
    memory_slots: int = 1024
    conversation_blocks: int = 32
    requests: int = 2000
    """Counted, after one of each conversation."""
    seed: int = 0

    @property
    def num_conversations(self) -> int:
        """Their blocks fill the memory tier twice."""
        return 2 * self.memory_slots // self.conversation_blocks


def uniform(options: HitOptions) -> Iterator[int]:
    """Any conversation may be next."""
    rng = random.Random(options.seed)  # noqa: S311  # a pattern of accesses, not a secret
    while True:
        yield rng.randrange(options.num_conversations)


def zipf(options: HitOptions) -> Iterator[int]:
    """The conversation of rank r is next with a probability in proportion to r ** -0.8."""
    rng = random.Random(options.seed)  # noqa: S311
    weights = [(rank + 1) ** -_ZIPF for rank in range(options.num_conversations)]
    while True:
        yield from rng.choices(range(options.num_conversations), weights, k=256)


def turns(options: HitOptions) -> Iterator[int]:
    """People who answer: each conversation comes again after a pause of half to one and a half mean ones."""
    rng = random.Random(options.seed)  # noqa: S311
    due = [rng.random() for _ in range(options.num_conversations)]
    while True:
        conversation = min(range(len(due)), key=due.__getitem__)
        due[conversation] += 0.5 + rng.random()
        yield conversation


PATTERNS: dict[str, Callable[[HitOptions], Iterator[int]]] = {"uniform": uniform, "zipf": zipf, "turns": turns}


def measure_hits(directory: Path, options: HitOptions) -> dict[str, Any]:
    """By pattern. The disk keeps up: the driver waits for it between requests."""
    return {name: _compare(directory, options, pattern) for name, pattern in PATTERNS.items()}


def _compare(directory: Path, options: HitOptions, pattern: Callable[[HitOptions], Iterator[int]]) -> dict[str, float]:
    alone = _hit_rate(options, pattern, None)
    both = _hit_rate(options, pattern, directory / "hits")
    (directory / "hits").unlink()
    return {
        "memory": round(alone, 4),
        "memory_and_disk": round(both, 4),
        "ideal": round(ideal_hit_rate(options, pattern), 4),
        "ratio": _over(both, alone),
        "ceiling": _over(1.0, alone),
    }


def _over(value: float, other: float) -> float:
    return round(value / other, 3) if other else float("inf")


def ideal_hit_rate(options: HitOptions, pattern: Callable[[HitOptions], Iterator[int]]) -> float:
    """Of memory alone: whose next use is farthest is given up, or not even kept (Belady, "A study of replacement
    algorithms for a virtual-storage computer", 1966). All blocks of a conversation are used at once, so it is exact for
    a memory of whole conversations.
    """
    asked = [*range(options.num_conversations), *islice(pattern(options), options.requests)]
    next_use = [len(asked)] * len(asked)
    latest: dict[int, int] = {}
    for at in range(len(asked) - 1, -1, -1):
        next_use[at] = latest.get(asked[at], len(asked))
        latest[asked[at]] = at
    kept: dict[int, int] = {}
    num_found = 0
    for at, conversation in enumerate(asked):
        num_found += at >= options.num_conversations and conversation in kept
        kept[conversation] = next_use[at]
        if len(kept) > options.memory_slots // options.conversation_blocks:
            del kept[max(kept, key=kept.__getitem__)]
    return num_found / options.requests


def _hit_rate(options: HitOptions, pattern: Callable[[HitOptions], Iterator[int]], path: Path | None) -> float:
    layout = KVLayout("benchmark", "", "none", 1, 1, 1, 64, 16, "bfloat16", (LayerGroup("full", (0,)),))
    store = KvStore(layout.block_bytes, options.memory_slots)
    if path is not None:
        slots = options.num_conversations * options.conversation_blocks
        store.open_disk(open_slab(path, slots, layout), lambda: None)
    for conversation in range(options.num_conversations):
        _request(store, _chain(conversation, options))
    requests = pattern(options)
    num_found = sum(_request(store, _chain(next(requests), options)) for _ in range(options.requests))
    store.close()
    return num_found / (options.requests * options.conversation_blocks)


def _chain(conversation: int, options: HitOptions) -> list[bytes]:
    blocks = range(options.conversation_blocks)
    return [conversation.to_bytes(8, "little") + block.to_bytes(8, "little") for block in blocks]


def _request(store: KvStore, chain: list[bytes]) -> int:
    """Blocks found; what was missing is there afterwards, and on disk."""
    loan = store.borrow(chain)
    loan.take_ready()
    while not loan.is_complete:
        store.pump(_TIMEOUT_S)
        loan.take_ready()
    num_found = loan.num_told
    loan.close()
    store.landed(store.reserve(store.wanted(chain)))
    store.flush(_TIMEOUT_S)
    return num_found

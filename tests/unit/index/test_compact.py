"""The compiled index against sets: the same histories, whatever collides, dies, grows or is refused."""

import logging
import random

import pytest

from tailrace.compiler import NativeUnavailableError
from tailrace.index import compact
from tailrace.index.compact import CompactIndex, IndexLimits, open_index
from tailrace.index.memory import MemoryIndex
from tailrace.index.prefix_index import PrefixHit
from tailrace.kv.events import KVEvent, KVEventKind, KVEvents, Tier
from tests.helpers.index import compact_index, functions


def block(number: int) -> bytes:
    return random.Random(number).randbytes(16)


CHAIN = [block(number) for number in range(4)]
A, B, C, D = CHAIN


# -- against a naive index --------------------------------------------------------------------------------------------


class NaiveIndex:
    """Says what the rules are, one dictionary a worker. Blocks are known by their fingerprints."""

    def __init__(self, limits: IndexLimits, fingerprint_bits: int) -> None:
        self.limits = limits
        self.mask = -1 << (64 - fingerprint_bits)
        self.epochs: dict[str, int] = {}
        self.sequences: dict[str, int] = {}
        self.most: dict[str, int] = {}
        self.held: dict[str, dict[int, Tier]] = {}

    def print(self, block_hash: bytes) -> int:
        return int.from_bytes(block_hash[:8], "little") & self.mask

    def enter(self, worker: str, epoch: int) -> bool:
        """Whether the epoch is the worker's newest."""
        if epoch > self.epochs.get(worker, -1):
            self.epochs[worker], self.sequences[worker], self.held[worker] = epoch, 0, {}
            self.most[worker] = self.limits.blocks_per_worker
        return epoch == self.epochs[worker]

    def change(self, worker: str, event: KVEvent) -> None:
        held, fingerprint = self.held[worker], self.print(event.block_hash)
        if event.kind is KVEventKind.RETRACT:
            held.pop(fingerprint, None)
        elif fingerprint in held or len(held) < self.most[worker]:
            held[fingerprint] = event.tier

    def apply(self, worker: str, epoch: int, first: int, events: list[KVEvent]) -> bool:
        if epoch < self.epochs.get(worker, -1):
            return True
        expected = self.sequences.get(worker, 0) if epoch == self.epochs.get(worker) else 0
        if first > expected:
            return False
        self.enter(worker, epoch)
        for event in events[expected - first :]:
            self.change(worker, event)
        self.sequences[worker] = max(expected, first + len(events))
        return True

    def reset(self, worker: str, epoch: int, hashes: list[bytes], following: int, max_blocks: int | None) -> None:
        if epoch < self.epochs.get(worker, -1):
            return
        most = self.most.get(worker) if epoch == self.epochs.get(worker) else None
        self.drop(worker)
        self.enter(worker, epoch)
        self.sequences[worker] = following
        if max_blocks is not None:
            self.most[worker] = min(max_blocks, self.limits.blocks_per_worker)
        elif most is not None:
            self.most[worker] = most
        for block_hash in hashes:
            self.change(worker, KVEvent(KVEventKind.PUBLISH, block_hash))

    def drop(self, worker: str) -> None:
        for book in (self.epochs, self.sequences, self.most, self.held):
            book.pop(worker, None)

    def searched(self, chain: list[bytes]) -> dict[str, int]:
        """By a binary search of each worker's own: the block after the last is held by nobody."""
        depths = {}
        for worker, held in self.held.items():
            if self.print(chain[0]) in held:
                low, high = 1, len(chain)
                while low < high:
                    middle = (low + high) // 2
                    low, high = (middle + 1, high) if self.print(chain[middle]) in held else (low, middle)
                depths[worker] = low
        return depths

    def hits(self, chain: list[bytes]) -> dict[str, PrefixHit]:
        hits = {}
        for worker, held in self.held.items():
            by_tier = [0] * len(Tier)
            for block_hash in chain:
                if (tier := held.get(self.print(block_hash))) is None:
                    break
                by_tier[tier] += 1
            if any(by_tier):
                hits[worker] = PrefixHit(sum(by_tier), tuple(by_tier))
        return hits

    def runs(self, chain: list[bytes], span: int) -> dict[str, PrefixHit]:
        hits = {}
        for worker, held in self.held.items():
            tiers = [held.get(self.print(block_hash)) for block_hash in chain]
            for depth in range(len(chain), 0, -1):
                needed = tiers[max(0, depth - span) : depth]
                if None not in needed:
                    hits[worker] = PrefixHit(depth, tuple(needed.count(tier) for tier in Tier))
                    break
        return hits


def random_event(rng: random.Random, chains: list[list[bytes]]) -> KVEvent:
    block_hash = rng.choice(rng.choice(chains))
    if rng.random() < 0.35:
        return KVEvent(KVEventKind.RETRACT, block_hash)
    return KVEvent(KVEventKind.PUBLISH, block_hash, rng.choice(list(Tier)))


def step(rng: random.Random, index: CompactIndex, naive: NaiveIndex, chains: list[list[bytes]]) -> None:
    """One change of one worker, to both."""
    worker, what = f"w{rng.randrange(8)}", rng.random()
    epoch = max(0, naive.epochs.get(worker, 1) + rng.choice([-1, 0, 0, 0, 0, 0, 0, 0, 1]))
    if what < 0.6:
        events = [random_event(rng, chains) for _ in range(rng.randrange(60))]
        first = max(0, naive.sequences.get(worker, 0) + rng.choice([0, 0, 0, 0, 0, 2, -1, -20]))
        told = events if rng.random() < 0.5 else KVEvents.of(events)
        assert index.apply(worker, epoch, first, told) == naive.apply(worker, epoch, first, events)
    elif what < 0.75:
        chain = rng.choice(chains)
        chain, tier = chain[: rng.randrange(len(chain) + 1)], rng.choice(list(Tier))
        index.publish(worker, epoch, chain, tier)
        if naive.enter(worker, epoch):
            for block_hash in chain:
                naive.change(worker, KVEvent(KVEventKind.PUBLISH, block_hash, tier))
    elif what < 0.85:
        chain = rng.choice(chains)
        chain = chain[rng.randrange(len(chain)) :]
        index.retract(worker, epoch, chain)
        if naive.enter(worker, epoch):
            for block_hash in chain:
                naive.change(worker, KVEvent(KVEventKind.RETRACT, block_hash))
    elif what < 0.95:
        hashes = [block_hash for chain in rng.sample(chains, 3) for block_hash in chain]
        following, most = rng.randrange(50), rng.choice([None, None, 10, 400])
        index.reset(worker, epoch, hashes, following, max_blocks=most)
        naive.reset(worker, epoch, hashes, following, most)
    else:
        index.drop_worker(worker)
        naive.drop(worker)


def make_chains(rng: random.Random) -> list[list[bytes]]:
    """Conversations: each begins with a part of an earlier one."""
    chains = [[rng.randbytes(16) for _ in range(5)]]
    for _ in range(25):
        trunk = rng.choice(chains)
        chains.append(trunk[: rng.randrange(len(trunk) + 1)] + [rng.randbytes(16) for _ in range(rng.randrange(1, 60))])
    return chains


@pytest.mark.parametrize(
    ("partition_bits", "fingerprint_bits"), [(0, 64), (4, 64), (10, 64), (0, 9), (3, 8), (2, 4), (0, 1)]
)
@pytest.mark.parametrize("seed", range(6))
def test_random_histories_agree_with_the_naive_index(partition_bits: int, fingerprint_bits: int, seed: int) -> None:
    rng = random.Random(seed)
    limits = IndexLimits(blocks_per_worker=rng.choice([30, 300, 10_000]))
    sizes = {"partition_bits": partition_bits, "fingerprint_bits": fingerprint_bits}
    index, naive = compact_index(limits, **sizes), NaiveIndex(limits, fingerprint_bits)
    chains = make_chains(rng)
    for _ in range(250):
        step(rng, index, naive, chains)
        for chain in rng.sample(chains, 3):
            assert index.longest_prefix_by_tier(chain) == naive.hits(chain)
            assert index.longest_prefix(chain) == naive.searched(chain)
            span = rng.choice([1, 2, 3, 7, 30])
            assert index.deepest_runs(chain, span) == naive.runs(chain, span)
        for worker in ("w0", "w1"):
            assert index.num_blocks(worker) == len(naive.held.get(worker, ()))
    index.check_integrity()
    assert index.stats().num_held == sum(map(len, naive.held.values()))


# -- lookups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 2, 3, 24, 31, 32, 33])
def test_without_holes_the_search_finds_what_the_walk_finds(length: int) -> None:
    index = compact_index()
    chain = [block(number) for number in range(length)]
    for held in range(length + 1):
        index.publish(f"w{held}", 1, chain[:held])
    expected = {f"w{held}": held for held in range(1, length + 1)}
    assert index.longest_prefix(chain) == expected
    assert {worker: hit.num_blocks for worker, hit in index.longest_prefix_by_tier(chain).items()} == expected


def test_a_hole_ends_a_walk_and_may_be_passed_by_a_search() -> None:
    index = compact_index()
    index.publish("p0", 1, [A, C, D])
    index.publish("p1", 1, [A, B, D])
    index.publish("p2", 1, [B, C, D])
    assert index.longest_prefix_by_tier(CHAIN) == {"p0": PrefixHit(1, (1, 0, 0)), "p1": PrefixHit(2, (2, 0, 0))}
    assert index.longest_prefix(CHAIN) == {"p0": 4, "p1": 2}


def test_a_block_that_moves_to_another_tier_is_counted_there() -> None:
    index = compact_index()
    index.publish("s0", 1, CHAIN, Tier.CPU)
    index.publish("s0", 1, [B, D], Tier.NVME)
    index.publish("p0", 1, [A, B])
    assert index.longest_prefix_by_tier(CHAIN) == {"s0": PrefixHit(4, (0, 2, 2)), "p0": PrefixHit(2, (2, 0, 0))}
    assert index.num_blocks("s0") == 4


def test_an_unknown_tier_is_a_retraction() -> None:
    index = compact_index()
    index.publish("s0", 1, CHAIN)
    index.apply("s0", 1, 0, KVEvents(bytes([1 | 3 << 4, 7]), B + D))
    assert (index.longest_prefix([A, B]), index.num_blocks("s0")) == ({"s0": 1}, 2)


def test_blocks_of_many_workers() -> None:
    index = compact_index()
    names = [f"w{number}" for number in range(1000)]
    for number, name in enumerate(names):
        index.publish(name, 1, CHAIN[: number % 5])
    assert index.longest_prefix(CHAIN) == {name: number % 5 for number, name in enumerate(names) if number % 5}
    for name in names[::2]:
        index.drop_worker(name)
    index.retract("w1", 1, CHAIN)
    assert index.longest_prefix(CHAIN) == {
        name: number % 5 for number, name in enumerate(names) if number % 5 and number % 2 and number != 1
    }
    index.check_integrity()


def test_two_blocks_with_one_fingerprint_are_one() -> None:
    index = compact_index()
    twin = A[:8] + bytes(8)
    index.publish("p0", 1, [A])
    assert index.longest_prefix([twin]) == {"p0": 1}
    index.publish("p0", 1, [twin])
    assert index.num_blocks("p0") == 1
    index.retract("p0", 1, [twin])
    assert index.longest_prefix([A]) == {}


@pytest.mark.parametrize("fingerprint", [0, 1, 2**64 - 1])
def test_no_fingerprint_means_something_else(fingerprint: int) -> None:
    index = compact_index()
    block_hash = fingerprint.to_bytes(8, "little") + bytes(8)
    assert index.longest_prefix([block_hash]) == {}
    index.publish("p0", 1, [block_hash, A])
    assert index.longest_prefix([block_hash, A]) == {"p0": 2}
    index.check_integrity()


def test_hashes_of_another_length_are_refused() -> None:
    index = compact_index()
    with pytest.raises(ValueError, match="1 hashes have 3 bytes; a block hash has 16"):
        index.longest_prefix([b"abc"])
    with pytest.raises(ValueError, match="a block hash has 16 bytes, not 3"):
        index.publish("p0", 1, [A, b"abc"])


# -- bounds -----------------------------------------------------------------------------------------------------------


def test_beyond_a_workers_limit_the_beginning_of_its_prefixes_stays(caplog: pytest.LogCaptureFixture) -> None:
    index = compact_index(IndexLimits(blocks_per_worker=2))
    index.publish("p0", 1, CHAIN)
    index.publish("p0", 1, CHAIN)
    index.publish("p1", 1, [A])
    assert index.longest_prefix(CHAIN) == {"p0": 2, "p1": 1}
    assert index.stats().num_refused == 4
    assert [record.getMessage() for record in caplog.records] == [
        "the prefix index takes up no more blocks of p0: 2 of its own, at most 2; 2 of all, at most 33554432"
    ]
    index.retract("p0", 1, [A])
    index.publish("p0", 1, [C])
    assert index.longest_prefix([B, C]) == {"p0": 2}


def test_the_total_limit_counts_a_block_for_each_that_holds_it() -> None:
    index = compact_index(IndexLimits(blocks=5))
    index.publish("p0", 1, CHAIN)
    index.publish("p1", 1, CHAIN)
    assert index.longest_prefix(CHAIN) == {"p0": 4, "p1": 1}
    index.retract("p0", 1, [D])
    index.publish("p1", 1, CHAIN)
    assert index.longest_prefix(CHAIN) == {"p0": 3, "p1": 2}


def test_the_dead_make_room_for_the_living() -> None:
    blocks = [block(number) for number in range(5000)]
    index = compact_index(IndexLimits(blocks=2500), partition_bits=4)
    index.publish("p0", 1, blocks[:2500])
    index.drop_worker("p0")
    assert index.stats().num_dead == 2500
    for start in range(2500, 5000, 100):
        index.publish("p1", 1, blocks[start : start + 100])
    index.publish("p1", 1, blocks[2500:])
    assert index.stats().num_dead == 0
    assert index.num_blocks("p1") == 2500
    index.check_integrity()


def test_a_dead_worker_is_swept_away_by_the_events_of_others() -> None:
    index = compact_index(partition_bits=4)
    index.publish("p0", 1, [block(number) for number in range(1000)])
    index.drop_worker("p0")
    assert index.stats().num_dead == 1000
    for _ in range(20):
        index.publish("p1", 1, [block(number) for number in range(2000, 3000)])
    stats = index.stats()
    assert (stats.num_dead, stats.num_held, stats.num_entries) == (0, 1000, 1000)


@pytest.mark.parametrize("holders", [["p0"], ["p0", "p1", "p2"]])
def test_what_a_worker_says_again_after_a_reset_takes_the_place_of_what_it_said_before(holders: list[str]) -> None:
    index = compact_index(IndexLimits(blocks=len(holders) * len(CHAIN)))
    for holder in holders:
        index.publish(holder, 1, CHAIN)
    for _ in range(compact.MAX_WORKERS + 1 if holders == ["p0"] else 3):
        index.reset("p0", 1, CHAIN, 0)
    stats = index.stats()
    assert (stats.num_dead, stats.num_held, stats.num_refused) == (0, len(holders) * len(CHAIN), 0)
    assert index.longest_prefix(CHAIN) == dict.fromkeys(holders, 4)


def test_what_was_held_gives_its_memory_back() -> None:
    index = compact_index(partition_bits=4)
    empty = index.stats().num_bytes
    blocks = [block(number) for number in range(20_000)]
    index.publish("p0", 1, blocks)
    assert 13 * len(blocks) < index.stats().num_bytes - empty < 16 * len(blocks)
    index.retract("p0", 1, blocks)
    assert index.stats().num_bytes - empty < 16 * 1000
    index.check_integrity()


@pytest.mark.parametrize("name", ["blocks", "blocks_per_worker"])
@pytest.mark.parametrize("count", [0, 2**32])
def test_an_impossible_limit_is_refused(name: str, count: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be between 1 and 4294967295, not {count}"):
        IndexLimits(**{name: count})


def test_beyond_the_number_of_workers_another_is_refused_until_one_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    index = compact_index()
    for number in range(compact.MAX_WORKERS):
        index.publish(str(number), 1, [])
    with pytest.raises(ValueError, match="no room for another worker; at most 65536"):
        index.publish("p0", 1, [A])
    index.drop_worker("7")
    index.publish("p0", 1, [A])
    assert index.longest_prefix([A]) == {"p0": 1}


# -- where it cannot be compiled --------------------------------------------------------------------------------------


def test_without_a_compiler_the_index_in_python_takes_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    index = open_index(tmp_path, IndexLimits(blocks_per_worker=3))
    assert isinstance(index, MemoryIndex)
    index.publish("p0", 1, CHAIN)
    assert index.num_blocks("p0") == 3
    assert [(record.levelno, "install gcc or clang" in record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, True)
    ]
    with pytest.raises(NativeUnavailableError):
        compact.load_functions(tmp_path)


def test_with_one_it_is_compact() -> None:
    index = CompactIndex(functions())
    index.publish("p0", 1, CHAIN)
    assert repr(index) == "<CompactIndex p0@1=4>"


@pytest.mark.parametrize("num_holders", [1, 2, 8, 32])
def test_the_memory_that_is_asked_for_is_not_exceeded(num_holders):
    memory = 16 << 20
    index = compact_index(IndexLimits.of_memory(memory, 1 << 23))
    random_ = random.Random(num_holders)
    while not index.stats().num_refused:
        hashes = [random_.randbytes(16) for _ in range(20_000)]
        for worker in range(num_holders):
            index.publish(f"w{worker}", 1, hashes)
    stats = index.stats()
    assert memory // 3 < stats.num_bytes <= memory
    first = index.num_blocks("w0")
    index.publish("newcomer", 1, [random_.randbytes(16) for _ in range(1000)])
    assert (index.num_blocks("w0"), index.num_blocks("newcomer")) == (first, 0), "what is there stays"

"""BlockPool against a model so naive that it can be believed: a dict of blocks, and a list in the order of eviction."""

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tailrace.kv.block_pool import BlockPool, BlockState, KVEventKind, RevocableLoan

NUM_BLOCKS = 6
EPOCH = 3
HASHES = [bytes([letter]) for letter in b"abcdefghijkl"]
# Small ones more often, so that free and cached blocks come together.
COUNTS = st.sampled_from([1, 1, 1, 2, 2, 3, 0, NUM_BLOCKS, NUM_BLOCKS + 1])
HELD = (BlockState.ACTIVE, BlockState.CACHED, BlockState.LENT, BlockState.LOANED)


@dataclass
class ModelBlock:
    references: int = 0
    lends: int = 0
    loans: int = 0
    block_hash: bytes | None = None
    generation: int = EPOCH << 32
    arriving: BlockState | None = None

    @property
    def state(self) -> BlockState:
        if self.arriving is not None:
            return self.arriving
        if self.references:
            return BlockState.ACTIVE
        if self.lends:
            return BlockState.LENT
        if self.loans:
            return BlockState.LOANED
        return BlockState.FREE if self.block_hash is None else BlockState.CACHED


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, epoch=EPOCH)
        self.model = {block: ModelBlock() for block in range(NUM_BLOCKS)}
        self.lru: list[int] = []
        self.index: set[bytes] = set()
        self.loans: list[RevocableLoan] = []
        self.revoked: list[RevocableLoan] = []

    def blocks_in(self, *states: BlockState) -> list[int]:
        return [block for block, entry in self.model.items() if entry.state in states]

    def choose(self, data: st.DataObject, blocks: list[int]) -> list[int]:
        """Some of `blocks`, each once, in any order."""
        return data.draw(st.lists(st.sampled_from(blocks), min_size=1, unique=True))

    def refresh_lru(self, touched: list[int]) -> None:
        """`touched` in the order in which they would have become evictable."""
        cached = self.blocks_in(BlockState.CACHED)
        kept = [block for block in self.lru if block in cached]
        self.lru = kept + [block for block in touched if block in cached and block not in kept]

    def take(self, count: int, blocks: list[int] | None) -> list[int]:
        free = self.blocks_in(BlockState.FREE)
        if count > len(free) + len(self.lru) + len(self.blocks_in(BlockState.LOANED)):
            assert blocks is None
            assert not self.revoked
            return []
        self.revoke(count - len(free) - len(self.lru))
        assert blocks is not None
        assert len(set(blocks)) == len(blocks) == count
        expected_evicted = self.lru[: max(0, count - len(free))]
        assert set(blocks[: len(free)]) <= set(free)
        assert blocks[len(free) :] == expected_evicted
        for block in blocks:
            self.model[block].block_hash = None
            self.model[block].generation += 1
        self.lru = self.lru[len(expected_evicted) :]
        return blocks

    def revoke(self, num_missing: int) -> None:
        """The oldest loans that keep back what is missing, and no others."""
        expected = []
        while num_missing > 0:
            before = self.blocks_in(BlockState.LOANED)
            loan = next(loan for loan in self.loans if set(loan.blocks) & set(before))
            expected.append(loan)
            self.end(loan)
            num_missing -= len(before) - len(self.blocks_in(BlockState.LOANED))
        assert self.revoked == expected
        assert all(loan.is_over for loan in expected)
        self.revoked.clear()

    def end(self, loan: RevocableLoan) -> None:
        self.loans.remove(loan)
        for block in loan.blocks:
            self.model[block].loans -= 1
        self.refresh_lru(list(loan.blocks)[::-1])

    @rule(count=COUNTS, hashes=st.lists(st.sampled_from(HASHES), max_size=NUM_BLOCKS))
    def allocate(self, count: int, hashes: list[bytes]) -> None:
        blocks = self.take(count, self.pool.allocate(count))
        for block in blocks:
            self.model[block].references = 1
        for block, block_hash in zip(blocks, hashes, strict=False):
            self.register(block, block_hash)

    @rule(count=COUNTS)
    def allocate_landing(self, count: int) -> None:
        for block in self.take(count, self.pool.allocate_landing(count)):
            self.model[block].arriving = BlockState.LANDING

    @precondition(lambda self: self.blocks_in(*HELD))
    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        blocks = self.choose(data, self.blocks_in(*HELD))
        self.pool.acquire(blocks)
        for block in blocks:
            self.model[block].references += 1
        self.refresh_lru([])

    @precondition(lambda self: self.blocks_in(BlockState.ACTIVE))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks = self.choose(data, self.blocks_in(BlockState.ACTIVE))
        self.pool.release(blocks)
        for block in blocks:
            self.model[block].references -= 1
        self.refresh_lru(blocks[::-1])

    @precondition(lambda self: self.blocks_in(*HELD))
    @rule(data=st.data())
    def lend(self, data: st.DataObject) -> None:
        blocks = self.choose(data, self.blocks_in(*HELD))
        self.pool.lend(blocks)
        for block in blocks:
            self.model[block].lends += 1
        self.refresh_lru([])

    @precondition(lambda self: any(entry.lends for entry in self.model.values()))
    @rule(data=st.data())
    def unlend(self, data: st.DataObject) -> None:
        blocks = self.choose(data, [block for block, entry in self.model.items() if entry.lends])
        self.pool.unlend(blocks)
        for block in blocks:
            self.model[block].lends -= 1
        self.refresh_lru(blocks[::-1])

    @precondition(lambda self: self.index_blocks())
    @rule(data=st.data())
    def lend_revocably(self, data: st.DataObject) -> None:
        blocks = self.choose(data, self.index_blocks())
        loan = self.pool.lend_revocably(blocks, lambda: self.revoked.append(loan))
        self.loans.append(loan)
        for block in blocks:
            self.model[block].loans += 1
        self.refresh_lru([])

    @precondition(lambda self: self.loans)
    @rule(data=st.data())
    def end_loan(self, data: st.DataObject) -> None:
        loan = data.draw(st.sampled_from(self.loans))
        self.pool.end_loan(loan)
        self.end(loan)
        self.pool.end_loan(loan)

    @precondition(lambda self: self.blocks_in(BlockState.LANDING))
    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        blocks = self.choose(data, self.blocks_in(BlockState.LANDING))
        self.pool.quarantine(blocks)
        for block in blocks:
            self.model[block].arriving = BlockState.QUARANTINED

    @precondition(lambda self: self.blocks_in(BlockState.LANDING, BlockState.QUARANTINED))
    @rule(data=st.data(), wanted=st.booleans())
    def end_read(self, data: st.DataObject, wanted: bool) -> None:
        blocks = self.choose(data, self.blocks_in(BlockState.LANDING, BlockState.QUARANTINED))
        if wanted:
            self.pool.landed(blocks)
        else:
            self.pool.abandon_landing(blocks)
        for block in blocks:
            self.model[block].arriving = None
            self.model[block].references = int(wanted)

    @precondition(lambda self: self.bare_blocks())
    @rule(data=st.data(), block_hash=st.sampled_from(HASHES))
    def register_later(self, data: st.DataObject, block_hash: bytes) -> None:
        self.register(data.draw(st.sampled_from(self.bare_blocks())), block_hash)

    def index_blocks(self) -> list[int]:
        return [block for block, entry in self.model.items() if entry.block_hash is not None]

    @precondition(lambda self: self.bare_blocks())
    @rule(data=st.data())
    def lend_a_bare_block_revocably(self, data: st.DataObject) -> None:
        with pytest.raises(ValueError, match="it is not registered"):
            self.pool.lend_revocably([data.draw(st.sampled_from(self.bare_blocks()))], lambda: None)

    def bare_blocks(self) -> list[int]:
        held = self.blocks_in(BlockState.ACTIVE, BlockState.LENT)
        return [block for block in held if self.model[block].block_hash is None]

    def register(self, block: int, block_hash: bytes) -> None:
        self.pool.register(block, block_hash)
        if all(entry.block_hash != block_hash for entry in self.model.values()):
            self.model[block].block_hash = block_hash

    @rule(data=st.data())
    def misuse(self, data: st.DataObject) -> None:
        """Whatever is refused changes nothing: the invariants below would see it."""
        blocks = data.draw(st.lists(st.integers(-1, NUM_BLOCKS), min_size=1, max_size=3))
        blocks.append(data.draw(st.sampled_from([-1, NUM_BLOCKS, blocks[0]])))
        for operation in ("acquire", "release", "lend", "unlend", "landed", "abandon_landing", "quarantine"):
            with pytest.raises(ValueError, match="block"):
                getattr(self.pool, operation)(blocks)
        with pytest.raises(ValueError, match="block"):
            self.pool.lend_revocably(blocks, lambda: None)

    @rule()
    def drain(self) -> None:
        for event in self.pool.drain_events():
            assert (event.block_hash in self.index) == (event.kind is KVEventKind.RETRACT)
            self.index ^= {event.block_hash}
        assert self.index == {entry.block_hash for entry in self.model.values()} - {None}

    @rule(hashes=st.lists(st.sampled_from(HASHES), max_size=4))
    def find(self, hashes: list[bytes]) -> None:
        by_hash = {entry.block_hash: block for block, entry in self.model.items()}
        known = [block_hash in by_hash for block_hash in hashes]
        length = known.index(False) if False in known else len(hashes)
        assert self.pool.find_prefix(hashes) == [by_hash[block_hash] for block_hash in hashes[:length]]

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.pool.check_integrity()
        for block, entry in self.model.items():
            assert self.pool.state(block) is entry.state
            assert self.pool.num_references(block) == entry.references
            assert self.pool.num_lends(block) == entry.lends
            assert self.pool.hash_of(block) == entry.block_hash
            assert self.pool.generation(block) == int(self.pool.stamps[block]) == entry.generation

    @invariant()
    def ledger_counts_the_model(self) -> None:
        ledger = self.pool.ledger()
        assert ledger.balances
        loaned = self.blocks_in(BlockState.LOANED)
        for state in set(BlockState) - {BlockState.LOANED, BlockState.LENT}:
            assert getattr(ledger, state.name.lower()) == len(self.blocks_in(state))
        assert ledger.lent == len(self.blocks_in(BlockState.LENT)) + len(loaned)
        assert self.pool.num_available == ledger.free + ledger.cached + len(loaned)


TestBlockPool = PoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)

"""Which blocks a sequence needs where every layer of the model attends to the same window of tokens.

A block that lies wholly before the window of the next token to be computed is read by nobody any more, and is let go
of. Its place in the block table stays, with an id that is valid and means nothing: kernels begin behind it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tailrace.kv.block_pool import BlockPool

NOBODYS = 0
"""Stands in a table for a block that was never there. A block id like any other: tables are gathered as they are."""


class BlockTable(Protocol):
    blocks: list[int]
    num_gone: int
    """Leading entries of `blocks` that are no longer this sequence's."""


@dataclass(frozen=True, slots=True)
class LeadingBlocks:
    """The beginning of a block table, of which those from `num_gone` on are needed."""

    blocks: list[int] = field(default_factory=list)
    num_gone: int = 0

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def needed(self) -> list[int]:
        return self.blocks[self.num_gone :]


@dataclass(frozen=True, slots=True)
class Window:
    tokens: int
    """That a token attends to, itself included; 0: all before it."""
    block_size: int

    def first_needed(self, position: int) -> int:
        """The first block that the token at `position`, or any behind it, attends to."""
        return max(0, position - self.tokens + 1) // self.block_size if self.tokens else 0

    @property
    def span(self) -> int:
        """Blocks before the end of a block that are needed to go on from there, at most; 0: all of them."""
        return max(1, -(-(self.tokens - 1) // self.block_size)) if self.tokens else 0

    def first_handed_over(self, num_tokens: int) -> int:
        """The first block of a prompt that who decodes it needs; never behind the prompt's last one."""
        return self.first_needed(num_tokens - 1)

    def let_go(self, table: BlockTable, position: int) -> list[int]:
        """What it no longer needs when `position` is computed next. The caller releases it."""
        first = min(self.first_needed(position), len(table.blocks))
        leaving = table.blocks[table.num_gone : first]
        table.num_gone = max(table.num_gone, first)
        return leaving

    def most_held(self, num_tokens: int, num_ahead: int) -> int:
        """Blocks that `num_tokens` tokens take at once, when up to `num_ahead` of them are computed before the
        blocks that are not needed for the first of these are let go of."""
        whole = self._blocks(num_tokens)
        # So many tokens in a row, of which the first may be the last of its block.
        num_behind_first = self.tokens + num_ahead - 2
        return min(whole, self._blocks(num_behind_first) + 1) if self.tokens else whole

    def least_held(self, num_tokens: int) -> int:
        """As `most_held`, of whoever goes on block by block: in a pool of fewer blocks it could not be finished."""
        # A step may be planned ahead of the one that fills a block.
        return self.most_held(num_tokens, self.block_size + 2)

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def find(self, pool: BlockPool, hashes: Sequence[bytes]) -> LeadingBlocks:
        """The longest prefix that can be gone on from, with what is in the pool. Changes nothing there.

        Without a window that is all blocks from the first on; with one, those of the window before its end.
        """
        if not self.tokens:
            return LeadingBlocks(pool.find_prefix(hashes))
        table, run, depth, first = [], 0, 0, 0
        for place, block in enumerate(pool.find_each(hashes)):
            table.append(NOBODYS if block is None else block)
            run = run + 1 if block is not None else 0
            needed = self.first_needed((place + 1) * self.block_size)
            if run > place - needed:
                depth, first = place + 1, needed
        return LeadingBlocks([NOBODYS] * first + table[first:depth], first)

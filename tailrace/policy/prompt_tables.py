"""Blocks for prompts that are computed here in chunks.

A prompt gets them all at once. Where every layer has a window it gets no more than it can need at once, so many for
the window and two chunks; as it lets go of blocks it gets others in their place.
"""

from tailrace.kv.block_pool import BlockPool
from tailrace.kv.window import BlockTable, LeadingBlocks, Window
from tailrace.policy.request import blocks_for


class PromptTables:
    """Reads and writes the pool; knows no prompts."""

    def __init__(self, pool: BlockPool, window: Window, chunk_tokens: int) -> None:
        self.pool = pool
        self.window = window
        self._chunk_tokens = chunk_tokens

    def most_held(self, num_tokens: int) -> int:
        """Blocks that a prompt of so many tokens holds at most."""
        # A chunk may be planned behind one that still computes.
        most = self.window.most_held(num_tokens, 2 * self._chunk_tokens)
        return min(most, self.pool.num_blocks) if self.window.tokens else most

    def end(self, num_tokens: int, num_gone: int) -> int:
        """Entries of its table when it needs those from `num_gone` on."""
        return min(blocks_for(num_tokens, self.window.block_size), num_gone + self.most_held(num_tokens))

    def end_now(self, num_tokens: int, num_gone: int, num_here: int, *, spare: int) -> int | None:
        """As `end`, or with how few it can begin: a pool that lacks some blocks may never have the most.

        None: the pool cannot give what is missing behind the first `num_here` now and keep `spare` blocks.
        """
        most = self.end(num_tokens, num_gone)
        least = min(most, num_gone + self.window.least_held(num_tokens)) if self.window.tokens else most
        room = self.pool.num_available - spare + num_here
        return most if most <= room else least if least <= room else None

    def claim(self, num_tokens: int, found: LeadingBlocks, *, spare: int = 0) -> LeadingBlocks | None:
        """A table that begins with what was found. None: the pool cannot give it now and keep `spare` blocks."""
        self.pool.acquire(found.needed)
        end = self.end_now(num_tokens, found.num_gone, len(found), spare=spare)
        fresh = self.pool.allocate(end - len(found)) if end is not None else None
        if fresh is None:
            self.pool.release(found.needed)
            return None
        return LeadingBlocks([*found.blocks, *fresh], found.num_gone)

    def grow(self, table: BlockTable, num_tokens: int) -> list[int]:
        """What is added to the table of a prompt that has let go of blocks, as far as there are some."""
        missing = self.end(num_tokens, table.num_gone) - len(table.blocks)
        if missing <= 0:
            return []
        fresh = self.pool.allocate(min(missing, self.pool.num_available)) or []
        table.blocks += fresh
        return fresh

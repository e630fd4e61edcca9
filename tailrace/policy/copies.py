"""Copies inside the pool that the next step makes: forks of a prompt's partly filled last block."""

from collections.abc import Sequence

from tailrace.kv.block_pool import BlockPool
from tailrace.plan import BlockCopy


class PendingCopies:
    """Holds a reference on each source until its copy is done: it must outlive the sequence that it came from."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._copies: list[BlockCopy] = []

    def add(self, source: int, target: int) -> None:
        self._pool.acquire([source])
        self._copies.append(BlockCopy(source, target))

    def drain(self) -> list[BlockCopy]:
        """For a plan; `done` follows when the plan has run."""
        copies, self._copies = self._copies, []
        return copies

    def done(self, copies: Sequence[BlockCopy]) -> None:
        # One reference a copy: several may have the same source.
        for copy in copies:
            self._pool.release([copy.source])

    def forget(self, targets: Sequence[int]) -> None:
        """These blocks are given back: a copy into them must not happen, somebody else's KV may be landing there."""
        dead = [copy for copy in self._copies if copy.target in targets]
        if dead:
            self._copies = [copy for copy in self._copies if copy.target not in targets]
            self.done(dead)

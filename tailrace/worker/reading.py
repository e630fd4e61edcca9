"""What pulling has in common, whatever is pulled: the way to owners, and when a read has taken too long."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeAlias

from tailrace.messages import KvSource, LendDone, LendTerms, LentBlocks
from tailrace.transfer import Link

STALL_FACTOR = 5.0
MIN_STALL_S = 1.0
"""A read is stalled after five times what its link's measured rate promises, and never before a second."""

LendEvents: TypeAlias = AsyncIterator[LentBlocks | LendDone]


class Peers(Protocol):
    """Ways to owners."""

    async def link(self, source: KvSource) -> Link: ...

    def lend(self, source: KvSource, terms: LendTerms) -> AbstractAsyncContextManager[LendEvents]: ...

    def identity(self) -> tuple[str, int]: ...


def stall_s(link: Link, num_bytes: int) -> float:
    rate = link.rate.bytes_per_s
    return max(MIN_STALL_S, STALL_FACTOR * num_bytes / rate) if rate > 0 else MIN_STALL_S

"""Requests whose prefix is fetched before the rest is computed: where it goes, what has come, who waits for the same.

Blocks count as long as they are contiguous with what was found here: one that is missing ends the prefix.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tailrace.kv.hashing import parent_of
from tailrace.kv.window import NOBODYS, LeadingBlocks
from tailrace.policy.prompt_tables import PromptTables
from tailrace.policy.request import Request, blocks_for

MAX_QUARANTINED_SHARE = 0.25
"""Of the pool. Past it nothing is fetched."""
FETCHING_SHARE = 2
"""At most one block of the pool in so many belongs to requests that wait for a fetch, unless there is only one."""
MAX_READING_AHEAD = 4
"""Nobody begins to fetch ahead of its turn while so many read: reads of one link take turns, and an owner that computes
lends a tenth of its pool at a time."""


@dataclass(slots=True, eq=False)
class PrefixFetch:
    """`blocks` is the block table: found here, or not needed | read into (up to `end`) | to be computed.

    With a window, only what is needed behind `end` is read.
    """

    request: Request
    blocks: list[int]
    num_gone: int
    """Leading entries that are not needed."""
    num_found: int
    """Blocks that it could have gone on from."""
    num_local: int
    end: int
    promised: frozenset[bytes]
    num_ready: int
    """Leading blocks that are completely written, and findable."""
    landed: set[int] = field(default_factory=set)
    """Blocks that were read well, in any order."""
    is_over: bool = False
    """Nothing is read any more: the rest can be computed."""

    @property
    def held(self) -> list[int]:
        return self.blocks[self.num_gone :]


def reach_of(pieces: Sequence[range], num_found: int) -> int:
    """Leading blocks that are there or in one of the pieces, the first `num_found` being here."""
    reached = num_found
    for piece in sorted(pieces, key=lambda piece: piece.start):
        if piece.start <= reached:
            reached = max(reached, piece.stop)
    return reached


class PrefixFetches:
    """By request id. The pool is written for these requests here only."""

    def __init__(self, tables: PromptTables) -> None:
        self._tables = tables
        self._pool = tables.pool
        self._block_size = tables.window.block_size
        self._offered: dict[int, Sequence[range]] = {}
        self._open: dict[int, PrefixFetch] = {}
        self._granted: list[PrefixFetch] = []

    def __len__(self) -> int:
        """Requests that have blocks and compute nothing yet."""
        return len(self._open)

    @property
    def num_tokens(self) -> int:
        """To be computed once what is fetched has come."""
        return sum(len(f.request.tokens) - f.end * self._block_size for f in self._open.values())

    def all(self) -> list[PrefixFetch]:
        return list(self._open.values())

    # -- before -------------------------------------------------------------------------------------------------------

    def offer(self, request_id: int, pieces: Sequence[range]) -> None:
        """These blocks of its chain are said to be elsewhere."""
        if pieces:
            self._offered[request_id] = pieces

    def forget(self, request_id: int) -> None:
        """What was offered to it."""
        self._offered.pop(request_id, None)

    def reach(self, request_id: int, num_found: int, limit: int) -> int:
        """Leading blocks, `limit` at most, that could be there after a fetch; `num_found` are here already."""
        reached = reach_of(self._offered.get(request_id, ()), num_found)
        return min(reached, limit) if self.may_fetch else num_found

    @property
    def num_quarantinable(self) -> int:
        """Blocks that may be late beside those that are."""
        return max(0, int(MAX_QUARANTINED_SHARE * self._pool.num_blocks) - self._pool.ledger().quarantined)

    @property
    def may_fetch(self) -> bool:
        """False: too many blocks wait for reads that are late."""
        return self._pool.ledger().quarantined <= MAX_QUARANTINED_SHARE * self._pool.num_blocks

    def will_find(self, hashes: Sequence[bytes], num_found: int) -> bool:
        """Does a fetch bring the block that a prompt with these hashes lacks first?"""
        return num_found < len(hashes) and any(
            hashes[num_found] in fetch.promised
            for fetch in self._open.values()
            # With a window only what is needed behind its end lands.
            if not fetch.is_over and (not fetch.num_gone or fetch.end <= len(hashes))
        )

    def num_read(self, num_found: int, end: int) -> int:
        """Blocks that a fetch up to `end` brings: with a window not all that are not here."""
        return end - max(num_found, self._tables.window.first_needed(end * self._block_size))

    def num_found(self, request_id: int) -> int:
        """Leading blocks that were here when its fetch began; 0: it does not fetch."""
        return self._open[request_id].num_found if request_id in self._open else 0

    @property
    def has_offers(self) -> bool:
        """Somebody may still fetch."""
        return bool(self._offered)

    def may_go_ahead(self, request: Request) -> bool:
        """May it fetch though others come before it? All that waits for a fetch stays within its share of the pool."""
        if (
            request.id not in self._offered
            or sum(not fetch.is_over for fetch in self._open.values()) >= MAX_READING_AHEAD
        ):
            return False
        held = self._num_held + blocks_for(len(request.tokens), self._block_size)
        return held * FETCHING_SHARE <= self._pool.num_blocks

    @property
    def _num_held(self) -> int:
        return sum(len(fetch.held) for fetch in self._open.values())

    def claim(self, request: Request, found: LeadingBlocks, end: int, *, spare: int = 0) -> bool:
        """Its table at once, `found` first.

        False: the pool cannot give it now and keep `spare` blocks, or too much of it is taken.
        """
        if self._num_held * FETCHING_SHARE > self._pool.num_blocks:
            return False
        num_gone = self._tables.window.first_needed(end * self._block_size)
        local, num_local = found.blocks[num_gone:], max(num_gone, len(found))
        self._pool.acquire(local)
        num_blocks = self._tables.end_now(len(request.tokens), num_gone, num_local, spare=spare)
        landing = self._pool.allocate_landing(end - num_local) if num_blocks is not None else None
        fresh = self._pool.allocate(num_blocks - end) if num_blocks is not None and landing is not None else None
        if landing is None or fresh is None:
            self._pool.release(local)
            return False
        table = [*[NOBODYS] * num_gone, *local, *landing, *fresh]
        promised = frozenset(request.hashes[len(found) : end])
        fetch = PrefixFetch(request, table, num_gone, len(found), num_local, end, promised, num_local)
        self._open[request.id] = fetch
        self._granted.append(fetch)
        self.forget(request.id)
        return True

    def drain_granted(self) -> list[PrefixFetch]:
        """Whose reads may begin; each once. Not those that were dropped since."""
        granted, self._granted = self._granted, []
        return [fetch for fetch in granted if self._open.get(fetch.request.id) is fetch]

    # -- meanwhile ----------------------------------------------------------------------------------------------------

    def landed(self, request_id: int, blocks: Sequence[int]) -> None:
        """A read into these blocks ended well. The request may be gone by now: then they are free."""
        if (fetch := self._open.get(request_id)) is None:
            self._pool.abandon_landing(blocks)
            return
        self._pool.landed(blocks)
        fetch.landed.update(blocks)
        while fetch.num_ready < fetch.end and fetch.blocks[fetch.num_ready] in fetch.landed:
            at, hashes = fetch.num_ready, fetch.request.hashes
            self._pool.register(fetch.blocks[at], hashes[at], parent_of(hashes, at), fetch.request.tenant)
            fetch.num_ready += 1

    # -- after --------------------------------------------------------------------------------------------------------

    def end(self, request_id: int, in_flight: Sequence[int]) -> PrefixFetch | None:
        """Nothing more comes. What did not is computed into the same blocks, unless some of them may still be written,
        or what has come cannot be gone on from: then all is given back but those, and the request is returned, to wait
        in line again."""
        if (fetch := self._open.get(request_id)) is None:
            return None
        if in_flight or self._tables.window.first_needed(fetch.num_ready * self._block_size) < fetch.num_gone:
            self.drop(request_id, in_flight)
            return fetch
        self._pool.landed(self._unread(fetch))
        fetch.is_over = True
        return None

    def has_ended(self, request_id: int) -> bool:
        """It can go on, and has not been taken yet."""
        return (fetch := self._open.get(request_id)) is not None and fetch.is_over

    def first_ended(self) -> PrefixFetch | None:
        """The first in line of those that can go on."""
        ended = [fetch for fetch in self._open.values() if fetch.is_over]
        return min(ended, key=lambda fetch: fetch.request.rank) if ended else None

    def take(self, ended: PrefixFetch) -> None:
        """Its blocks are the caller's now."""
        del self._open[ended.request.id]

    def drop(self, request_id: int, in_flight: Sequence[int]) -> bool:
        """Gives back all but the blocks `in_flight`, which stay landing. False: no such request.

        At once, whatever computes: no step knows these blocks.
        """
        if (fetch := self._open.pop(request_id, None)) is None:
            return False
        unread = [] if fetch.is_over else self._unread(fetch)
        outside = set(unread)
        self._pool.release([block for block in fetch.held if block not in outside])
        writing = set(in_flight)
        self._pool.abandon_landing([block for block in unread if block not in writing])
        return True

    def _unread(self, fetch: PrefixFetch) -> list[int]:
        return [block for block in fetch.blocks[fetch.num_local : fetch.end] if block not in fetch.landed]

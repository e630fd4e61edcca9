"""The prefix index in Redis: which worker holds which block, for whoever has no mirror of it.

Entries are hints. One counts while its worker is registered in the same life and edition, so a worker that dies takes
all its entries along at once; what they occupy, Redis gets back when their time to live is over
(docs/adr/0018-redis-index.md).
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from tailrace.index.keys import ENTRY_BYTES, MARK_BYTES, KeySpace, Life, entries
from tailrace.index.prefix_index import PrefixHit, deepest_runs
from tailrace.index.redis_client import Command, Node, RedisClient, ScriptCall
from tailrace.index.registry import Registry
from tailrace.index.scripts import PUBLISH, RETRACT, SEARCH, Script
from tailrace.index.trouble import RedisTroubleError
from tailrace.kv.events import Tier

ENTRY_TTL_S = 3600.0
"""A worker repeats what it holds three times in this time."""
MAX_KEYS = 256
"""Of one script call: Redis does nothing else meanwhile, some 0.3 ms."""
REGISTRY_AGE_S = 1.0
_TIERS = {int(tier): tier for tier in Tier}


class RedisIndex:
    """`publish`, `retract` and `longest_prefix`. Event loop only; every call raises RedisTroubleError."""

    def __init__(self, client: RedisClient, keys: KeySpace, registry: Registry) -> None:
        self._client, self._keys, self._registry = client, keys, registry
        self._registry_read_at = float("-inf")

    # -- what workers tell --------------------------------------------------------------------------------------------

    async def publish(self, life: Life, hashes: Sequence[bytes], tier: Tier = Tier.WORKER) -> None:
        """The worker holds these blocks, from now on and for ENTRY_TTL_S."""
        await self._client.all(self.publish_commands(life, hashes, tier))

    async def retract(self, life: Life, hashes: Sequence[bytes]) -> None:
        """The worker no longer holds these blocks."""
        await self._client.all(self.retract_commands(life, hashes))

    def publish_commands(
        self, life: Life, hashes: Sequence[bytes], tier: Tier = Tier.WORKER
    ) -> list[Command | ScriptCall]:
        return self._scripts(PUBLISH, hashes, (life.entry(tier), int(ENTRY_TTL_S * 1000)))

    def retract_commands(self, life: Life, hashes: Sequence[bytes]) -> list[Command | ScriptCall]:
        return self._scripts(RETRACT, hashes, (life.mark,))

    def _scripts(
        self, script: Script, hashes: Sequence[bytes], args: Sequence[bytes | int]
    ) -> list[Command | ScriptCall]:
        keys = self._keys.blocks(hashes)
        groups = self._keys.by_slot(hashes, keys) if self._client.is_cluster else [keys]
        return [
            ScriptCall(script, group[start : start + MAX_KEYS], args)
            for group in groups
            for start in range(0, len(group), MAX_KEYS)
        ]

    # -- what is asked ------------------------------------------------------------------------------------------------

    async def longest_prefix(self, hashes: Sequence[bytes]) -> dict[str, int]:
        """Leading blocks of `hashes` that each registered worker holds; workers that hold none are not named.

        One command to each node that has a part of the blocks, all at once. Where a hint is missing in the middle, more
        may be counted, on a single Redis as a CompactIndex does: see `_combined`.
        """
        if not hashes:
            return {}
        try:
            reached = await self._search(hashes)
        except RedisTroubleError:
            if not self._client.is_cluster:
                raise
            # A slot has moved, or a node is gone: the library follows, and knows better the next time.
            return depths(await self._values(hashes), self._registry.by_mark)
        by_mark = self._registry.by_mark
        return {by_mark[mark]: depth for mark, depth in reached.items() if mark in by_mark}

    async def _search(self, hashes: Sequence[bytes]) -> dict[bytes, int]:
        """By mark."""
        parts = self._parts(hashes)
        calls = [ScriptCall(SEARCH, (), (self._keys.before_braces, b"".join(part.hashes))) for part in parts.values()]
        answers = await self._client.all(calls, list(parts))
        if not self._is_fresh:
            await self._take_registry(await self._client.all(self._registry.read_commands()))
        return _combined(zip(parts.values(), answers, strict=True), len(hashes))

    def _parts(self, hashes: Sequence[bytes]) -> Mapping[Node, "_Part"]:
        """By the node that has them; the first block's comes first."""
        if not self._client.is_cluster:
            return {None: _Part(range(len(hashes)), hashes)}
        owners = self._client.owners(self._keys.slots)
        places: dict[Node, list[int]] = {}
        for place, block_hash in enumerate(hashes):
            places.setdefault(owners[block_hash[0]], []).append(place)
        return {node: _Part(here, [hashes[place] for place in here]) for node, here in places.items()}

    async def longest_prefix_by_tier(self, hashes: Sequence[bytes]) -> dict[str, PrefixHit]:
        """As `longest_prefix`, and how many of the blocks lie on which tier."""
        counts: dict[str, list[int]] = {}
        for depth, here in enumerate(await self.holders(hashes)):
            for worker_id, tier in here.items():
                by_tier = counts.setdefault(worker_id, [0] * len(Tier)) if not depth else counts.get(worker_id, [])
                if sum(by_tier) == depth and by_tier:
                    by_tier[tier] += 1
        return {worker_id: PrefixHit(sum(by_tier), tuple(by_tier)) for worker_id, by_tier in counts.items()}

    async def deepest_runs(self, hashes: Sequence[bytes], span: int) -> dict[str, PrefixHit]:
        """As PrefixIndex.deepest_runs; reads every block."""
        return deepest_runs(await self.holders(hashes), span)

    async def holders(self, hashes: Sequence[bytes]) -> list[dict[str, Tier]]:
        """Who holds each block, and where."""
        by_mark = self._registry.by_mark
        return [
            {by_mark[mark]: _TIERS[tier] for mark, tier in entries(value or b"") if mark in by_mark and tier in _TIERS}
            for value in await self._values(hashes)
        ]

    @property
    def _is_fresh(self) -> bool:
        """What is known of the registry."""
        return time.monotonic() - self._registry_read_at < REGISTRY_AGE_S

    async def _take_registry(self, answers: list[object]) -> None:
        await self._registry.take(answers)
        self._registry_read_at = time.monotonic()

    async def _values(self, hashes: Sequence[bytes]) -> Sequence[bytes | None]:
        if not hashes:
            return []
        keys = self._keys.blocks(hashes)
        if self._is_fresh and not self._client.is_cluster:
            return cast(list[bytes | None], (await self._client.all([("MGET", *keys)], [None]))[0])
        groups = self._keys.by_slot(hashes, keys) if self._client.is_cluster else [keys]
        lookups: list[Command | ScriptCall] = [("MGET", *group) for group in groups]
        registry = [] if self._is_fresh else self._registry.read_commands()
        answers = await self._client.all([*lookups, *registry])
        if registry:
            await self._take_registry(answers[len(lookups) :])
        found: dict[bytes, bytes | None] = {}
        for group, values in zip(groups, answers, strict=False):
            found.update(zip(group, values, strict=True))
        return [found[key] for key in keys]


class _Part(NamedTuple):
    """Blocks of a prompt that one node has."""

    places: Sequence[int]
    hashes: Sequence[bytes]


def _combined(parts: Iterable[tuple[_Part, Sequence[Any]]], num_blocks: int) -> dict[bytes, int]:
    """Leading blocks by mark, of the parts of a prompt and what SEARCH answers to each.

    A prefix ends at the first block of which a node says that it is missing. A node passes over some holes: no prefix
    ends before its first one, nor at a block that is held.
    """
    reached: dict[bytes, int] = {}
    for (places, _), answer in parts:
        ends = [*places, num_blocks]
        here = {mark: ends[depth] for mark, depth in zip(answer[::2], answer[1::2], strict=True)}
        if places[0] == 0:
            reached = here
        else:
            reached = {mark: min(end, here.get(mark, places[0])) for mark, end in reached.items()}
    return reached


def depths(values: Sequence[bytes | None], by_mark: dict[bytes, str]) -> dict[str, int]:
    """Leading values in which each mark stands, by its owner. Equal values in a row, the usual case, cost little."""
    alive: dict[bytes, str] | None = None
    reached: dict[str, int] = {}
    before: bytes | None = None
    for depth, value in enumerate(values):
        if value == before and depth:
            continue
        before = value
        here = _marks(value) if value else frozenset()
        if alive is None:
            alive = {mark: by_mark[mark] for mark in here if mark in by_mark}
        else:
            for mark in [mark for mark in alive if mark not in here]:
                reached[alive.pop(mark)] = depth
        if not alive:
            return reached
    return {**reached, **dict.fromkeys((alive or {}).values(), len(values))}


def _marks(value: bytes) -> frozenset[bytes]:
    return frozenset(value[start : start + MARK_BYTES] for start in range(0, len(value) - MARK_BYTES, ENTRY_BYTES))

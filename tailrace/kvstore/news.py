"""What changed of which blocks can be had, and on which tier, until somebody takes it."""

from collections.abc import Callable

from tailrace.kv.events import KVEvent, KVEventKind
from tailrace.kvstore.slots import StoredBlock


class StoreNews:
    """`KvStore` notes every change here; whoever tells others drains it."""

    def __init__(self) -> None:
        self.on_first: Callable[[], None] = lambda: None
        """There was nothing to drain, and now there is. Not called again before the next `drain`."""
        self._events: list[KVEvent] = []

    def note(self, block: StoredBlock) -> None:
        """To be called whenever a copy of the block has come or gone."""
        tier = block.tier
        if tier is block.told:
            return
        block.told = tier
        if tier is None:
            self._events.append(KVEvent(KVEventKind.RETRACT, block.block_hash))
        else:
            self._events.append(KVEvent(KVEventKind.PUBLISH, block.block_hash, tier))
        if len(self._events) == 1:
            self.on_first()

    def skip(self, block: StoredBlock) -> None:
        """Others learn of it by themselves: whoever begins to listen asks for all there is."""
        block.told = block.tier

    def drain(self) -> list[KVEvent]:
        """Every change since the last drain, in order. They pile up: to be called soon after `on_first`."""
        events, self._events = self._events, []
        return events

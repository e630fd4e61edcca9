"""What a router has sent to workers and they have not computed yet: seconds of queue, and blocks that will be there.

Counted from the moment of the decision, so that a burst does not herd and the next turn of a conversation finds the
worker that still computes the last one. No clock in here: every call brings the time.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest


@dataclass(frozen=True, slots=True)
class _Held:
    prefill_s: float
    hashes: Sequence[bytes]
    num_tokens: int


@dataclass(slots=True)
class _Queue:
    """One worker's, first come, first served."""

    held: OrderedDict[int, _Held] = field(default_factory=OrderedDict)
    expected: Counter[bytes] = field(default_factory=Counter)
    waiting_s: float = 0.0
    """Of all that is held."""
    waiting_tokens: int = 0
    head_since_s: float = 0.0
    """Since when the first of them can have been computing."""
    head_s: float = 0.0
    """What that one takes."""

    def backlog_s(self, now_s: float) -> float:
        gone_s = now_s - self.head_since_s
        if gone_s <= 0.0:
            return self.waiting_s
        left_s = self.waiting_s - (gone_s if gone_s < self.head_s else self.head_s)
        return left_s if left_s > 0.0 else 0.0


class Reservations:
    """By worker id and by handle, which names one request on one worker."""

    def __init__(self) -> None:
        self._queues: dict[str, _Queue] = {}

    def hold(
        self,
        worker_id: str,
        handle: int,
        hashes: Sequence[bytes],
        prefill_s: float,
        now_s: float,
        num_tokens: int,
    ) -> None:
        """`num_tokens`: of the prompt. Raises ValueError for a handle that is held already."""
        queue = self._queues.setdefault(worker_id, _Queue())
        if handle in queue.held:
            raise ValueError(f"handle {handle} of {worker_id} is held already")
        if not queue.held:
            queue.head_since_s, queue.head_s = now_s, prefill_s
        queue.held[handle] = _Held(prefill_s, hashes, num_tokens)
        queue.expected.update(hashes)
        queue.waiting_s += prefill_s
        queue.waiting_tokens += num_tokens

    def release(self, worker_id: str, handle: int, now_s: float) -> None:
        """Computed, failed or cancelled; a handle that is not held is no error."""
        queue = self._queues.get(worker_id)
        if queue is None or handle not in queue.held:
            return
        was_head = next(iter(queue.held)) == handle
        held = queue.held.pop(handle)
        queue.waiting_s -= held.prefill_s
        queue.waiting_tokens -= held.num_tokens
        for block_hash in held.hashes:
            if queue.expected[block_hash] == 1:
                del queue.expected[block_hash]
            else:
                queue.expected[block_hash] -= 1
        if not queue.held:
            del self._queues[worker_id]
        elif was_head:
            queue.head_since_s, queue.head_s = now_s, next(iter(queue.held.values())).prefill_s

    def num_held(self, worker_id: str) -> int:
        queue = self._queues.get(worker_id)
        return len(queue.held) if queue is not None else 0

    def backlogs_s(self, now_s: float) -> dict[str, float]:
        """`backlog_s` of those that have one."""
        return {worker_id: queue.backlog_s(now_s) for worker_id, queue in self._queues.items()}

    def backlog_s(self, worker_id: str, now_s: float) -> float:
        """Until a request sent now would begin to be computed, by what was predicted for those before it."""
        queue = self._queues.get(worker_id)
        return queue.backlog_s(now_s) if queue is not None else 0.0

    def backlog_tokens(self) -> dict[str, int]:
        """All tokens of the prompts that are held, by worker: no fewer than the worker counts of them, which has not
        looked for what is cached of those that wait."""
        return {worker_id: queue.waiting_tokens for worker_id, queue in self._queues.items()}

    def worker_ids(self) -> list[str]:
        """Who has anything."""
        return list(self._queues)

    def newest(self) -> Iterator[tuple[str, Sequence[bytes]]]:
        """Worker id and blocks of what is held, each worker's latest first, the workers by turns."""
        latest = [
            [(worker_id, held.hashes) for held in reversed(queue.held.values())]
            for worker_id, queue in self._queues.items()
        ]
        for row in zip_longest(*latest):
            yield from (entry for entry in row if entry is not None)

    def extend(self, hits: Mapping[str, int], hashes: Sequence[bytes]) -> dict[str, int]:
        """`hits`, leading blocks of `hashes` by worker, gone on with over the blocks that will be there."""
        found, num_hashes = dict(hits), len(hashes)
        for worker_id, queue in self._queues.items():
            depth = hits.get(worker_id, 0)
            while depth < num_hashes and hashes[depth] in queue.expected:
                depth += 1
                found[worker_id] = depth
        return found

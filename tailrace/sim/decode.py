"""A decode worker under virtual time: one running batch, whose steps take as long as its weights and its KV to read.

It has the product's own BlockPool: what a sequence leaves, answer included, stays cached there and can be lent.

A step of B sequences with C tokens of context takes a + b C seconds, and leaves C + B tokens. So n steps from C take
n (a + b C) + b B n (n - 1) / 2, and all steps until somebody joins or leaves are one event. `stepwise` makes an event
of each step instead; both must agree, and a test says that they do.
"""

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from tailrace.index.prefix_index import PrefixIndex
from tailrace.kv.block_pool import BlockPool, BlockState
from tailrace.policy.routing import WorkerView
from tailrace.sim.prefill import EPOCH, LAYOUT
from tailrace.sim.profile import HardwareProfile
from tailrace.types import Role


@dataclass(frozen=True, slots=True)
class DecodeJob:
    number: int
    num_context: int
    """Tokens whose KV its first step reads: the prompt."""
    num_steps: int
    """Output tokens after the first, which prefill drew."""
    num_blocks: int
    """Held for its whole life."""
    hashes: Sequence[bytes] = ()
    """Of its leading full blocks, those of the answer included as far as they are known."""


class DecodeNode:
    """Event loop: `accept`, then `advance` at the time that `next_event_s` names.

    Joining and leaving happen between two steps only.
    """

    def __init__(
        self,
        worker_id: str,
        num_blocks: int,
        max_num_seqs: int,
        profile: HardwareProfile,
        *,
        stepwise: bool = False,
    ) -> None:
        self.worker_id = worker_id
        self.pool = BlockPool(num_blocks, epoch=EPOCH)
        self._next_sequence = 0
        self._max_num_seqs = max_num_seqs
        self._base_s = profile.step_base_s
        self._per_token_s = profile.step_per_token_s
        self._link_bytes_per_s = profile.link_bytes_per_s
        self._stepwise = stepwise
        self._waiting: deque[DecodeJob] = deque()
        self._ends: list[tuple[int, int, DecodeJob, list[int]]] = []
        """Heap of (step after which it leaves, number, job, its blocks)."""
        self._steps = 0
        """Made so far, by all its batches."""
        self._boundary_s = 0.0
        """When the last step that was accounted for ended."""
        self._context = 0

    def accept(self, job: DecodeJob, now_s: float) -> None:
        """Its KV is here: it joins at the end of the step that runs now."""
        if not self._ends:
            self._boundary_s = max(self._boundary_s, now_s)
        self._waiting.append(job)

    def keep(self, hashes: Sequence[bytes]) -> None:
        """Of a prompt of which nothing is decoded here: cached, where there is room."""
        found = self.pool.find_prefix(hashes)
        self.pool.acquire(found)
        fresh = self.pool.allocate(len(hashes) - len(found)) or []
        for block, name in zip(fresh, hashes[len(found) :], strict=False):
            self.pool.register(block, name)
        self.pool.release(found + fresh)

    def answers_at_s(self, now_s: float) -> float:
        """When it sees what it is told now: at once, or between two steps."""
        return max(now_s, self._boundary_s + self._duration_s(self._steps_by(now_s) + 1)) if self._ends else now_s

    def next_event_s(self, now_s: float) -> float | None:
        """When the batch changes next, by what is known now; None: nothing runs."""
        if not self._ends:
            return max(self._boundary_s, now_s) if self._can_join() else None
        return self._boundary_s + self._duration_s(self._steps_until_change(now_s))

    def advance(self, now_s: float) -> list[DecodeJob]:
        """The batch as it is after the steps that have ended by `now_s`; returns who left it."""
        if self._ends:
            count = self._steps_by(now_s)
            self._boundary_s += self._duration_s(count)
            self._context += count * len(self._ends)
            self._steps += count
        else:
            self._boundary_s = max(self._boundary_s, now_s)
        left: list[DecodeJob] = []
        while self._ends and self._ends[0][0] <= self._steps:
            _, _, job, blocks = heapq.heappop(self._ends)
            for block, name in zip(blocks, job.hashes, strict=False):
                self.pool.register(block, name)
            self.pool.release(blocks)
            self._context -= job.num_context + job.num_steps
            left.append(job)
        if not self._ends or self._boundary_s >= now_s:
            # Not in the middle of a step.
            self._join()
        return left

    def view(self, now_s: float) -> WorkerView:
        """Its load report at `now_s`, whether or not each step was an event."""
        ledger = self.pool.ledger()
        context = self._context + (self._steps_by(now_s) * len(self._ends) if self._ends else 0)
        return WorkerView(
            worker_id=self.worker_id,
            role=Role.DECODE,
            fingerprint=LAYOUT,
            num_waiting=len(self._waiting),
            num_running=len(self._ends),
            free_blocks=ledger.free,
            cached_blocks=ledger.cached,
            total_blocks=ledger.total,
            booked_blocks=sum(job.num_blocks for job in self._waiting),
            decode_step_s=self._base_s + self._per_token_s * context,
            transfer_bytes_per_s=self._link_bytes_per_s,
            max_num_seqs=self._max_num_seqs,
        )

    def _join(self) -> None:
        while self._can_join():
            job = self._waiting.popleft()
            found = self.pool.find_prefix(job.hashes)
            self.pool.acquire(found)
            fresh = self.pool.allocate(job.num_blocks - len(found))
            assert fresh is not None, "_can_join counted them"
            self._context += job.num_context
            heapq.heappush(self._ends, (self._steps + job.num_steps, job.number, job, found + fresh))

    def publish(self, index: PrefixIndex) -> None:
        """Tells the index what changed in the cache."""
        if events := self.pool.drain_events():
            index.apply(self.worker_id, EPOCH, self._next_sequence, events)
            self._next_sequence += len(events)

    def _duration_s(self, count: int) -> float:
        step_s = self._base_s + self._per_token_s * self._context
        return count * step_s + self._per_token_s * len(self._ends) * count * (count - 1) / 2

    def _steps_until_change(self, now_s: float) -> int:
        until_leave = self._ends[0][0] - self._steps
        if self._stepwise:
            return 1
        if not self._can_join():
            return until_leave
        return min(until_leave, max(1, self._steps_covering(now_s - self._boundary_s)))

    def _can_join(self) -> bool:
        if not self._waiting or len(self._ends) >= self._max_num_seqs:
            return False
        job = self._waiting[0]
        found = self.pool.find_prefix(job.hashes)
        # Those of the prefix that nobody holds are counted as available, and are not to be had twice.
        idle = sum(self.pool.state(block) is BlockState.CACHED for block in found)
        return job.num_blocks - len(found) <= self.pool.num_available - idle

    def _steps_by(self, now_s: float) -> int:
        """Whole steps that have ended by `now_s`, no further than where somebody leaves."""
        most = self._ends[0][0] - self._steps
        count = min(most, self._steps_covering(now_s - self._boundary_s))
        return count if self._boundary_s + self._duration_s(count) <= now_s else count - 1

    def _steps_covering(self, seconds: float) -> int:
        """The least number of steps that takes `seconds` or more."""
        if seconds <= 0.0:
            return 0
        # b B / 2 n^2 + (a + b C - b B / 2) n - seconds = 0, by the root formula that keeps its digits.
        square = self._per_token_s * len(self._ends) / 2
        linear = self._base_s + self._per_token_s * self._context - square
        root = 2 * seconds / (linear + math.sqrt(linear * linear + 4 * square * seconds))
        count = max(0, math.floor(root) - 1)
        while self._duration_s(count) < seconds:
            count += 1
        return count

"""A decode worker under virtual time: one running batch, whose steps take as long as its weights and its KV to read.

It has the product's own BlockPool: what a sequence leaves, answer included, stays cached there and can be lent.

A step of B sequences with C tokens of context takes a + r B + b C seconds, and leaves C + B tokens. So n steps from C
take n (a + r B + b C) + b B n (n - 1) / 2, and all steps until somebody joins or leaves are one event. `stepwise` makes
an event of each step instead; both must agree, and a test says that they do. A step with chunks of a prompt that is
computed here is always an event of its own.
"""

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from tailrace.index.prefix_index import PrefixIndex
from tailrace.kv.block_pool import BlockPool, BlockState
from tailrace.policy.estimates import PrefillFit
from tailrace.policy.prefix_fetches import PrefixFetch
from tailrace.policy.routing import WorkerView
from tailrace.policy.slots import Slots
from tailrace.sim.local_prompts import LocalJob, LocalPrompts
from tailrace.sim.prefill import EPOCH, LAYOUT, FetchedShare, PrefillJob
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


@dataclass(frozen=True, slots=True)
class DecodeChange:
    """What a step has ended."""

    left: list[DecodeJob] = field(default_factory=list)
    prefilled: list[PrefillJob] = field(default_factory=list)
    """Prompts that were computed here; who goes on is in the batch."""


@dataclass(frozen=True, slots=True)
class _Row:
    job: DecodeJob
    blocks: list[int]
    slot: int


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
        block_tokens: int = 1,
        stepwise: bool = False,
    ) -> None:
        self.worker_id = worker_id
        self.block_tokens = block_tokens
        self.pool = BlockPool(num_blocks, epoch=EPOCH)
        self._next_sequence = 0
        self._max_num_seqs = max_num_seqs
        self._profile = profile
        self._base_s = profile.step_base_s
        self._per_row_s = profile.step_per_row_s
        self._per_token_s = profile.step_per_token_s
        self._link_bytes_per_s = profile.link_bytes_per_s
        self._stepwise = stepwise
        self._slowdown = 1.0
        self._waiting: deque[DecodeJob] = deque()
        self._slots = Slots(max_num_seqs)
        self._ends: list[tuple[int, int, _Row]] = []
        """Heap of (step after which it leaves, number, row)."""
        self._local = LocalPrompts(self.pool, self._slots, block_tokens, profile.chunk_tokens)
        self._locals: dict[int, DecodeJob] = {}
        """What becomes of the prompts that are computed here."""
        self._chunks_s = 0.0
        """Of the step in flight, if it has chunks; 0: it has none."""
        self._may_compute = False
        """Something has changed since prompts were last looked at in vain."""
        self._steps = 0
        """Made so far, by all its batches."""
        self._boundary_s = 0.0
        """When the last step that was accounted for ended."""
        self._context = 0

    def accept(self, job: DecodeJob, now_s: float) -> None:
        """Its KV is here: it joins at the end of the step that runs now."""
        self._begin(now_s)
        self._waiting.append(job)

    def accept_local(self, job: PrefillJob, then: DecodeJob, now_s: float) -> None:
        """Its prompt is computed here, in chunks beside the batch, from the end of the step that runs now on."""
        self._begin(now_s)
        self._locals[job.number] = then
        self._local.submit(LocalJob(job, then.num_blocks))
        self._may_compute = True

    def wake(self) -> None:
        """Blocks, or what was fetched, may let a prompt go on."""
        self._may_compute = self._local.has_work

    def _begin(self, now_s: float) -> None:
        if not self.is_computing:
            self._boundary_s = max(self._boundary_s, now_s)

    @property
    def is_computing(self) -> bool:
        return bool(self._ends or self._chunks_s)

    def slow_down(self, factor: float, now_s: float) -> None:
        """Steps take `factor` times as long as the profile says, the one in flight too unless it has chunks."""
        if factor != self._slowdown:
            if self._ends and not self._chunks_s:
                self._account(self._steps_by(now_s))
            self._slowdown = factor

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
        if self._chunks_s:
            return self._boundary_s + self._chunks_s
        return max(now_s, self._boundary_s + self._duration_s(self._steps_by(now_s) + 1)) if self._ends else now_s

    def next_event_s(self, now_s: float) -> float | None:
        """When the batch changes next, by what is known now; None: nothing runs."""
        if self._chunks_s:
            return self._boundary_s + self._chunks_s
        if not self._ends:
            return max(self._boundary_s, now_s) if self._can_join() or self._may_compute else None
        return max(now_s, self._boundary_s + self._duration_s(self._steps_until_change(now_s)))

    def advance(self, now_s: float) -> DecodeChange:
        """The batch as it is after the steps that have ended by `now_s`; who left it, and whose prompt is computed."""
        change = DecodeChange()
        if self._chunks_s:
            if self._boundary_s + self._chunks_s > now_s:
                return change
            self._end_chunks(change)
        elif self._ends:
            self._account(self._steps_by(now_s))
        else:
            self._boundary_s = max(self._boundary_s, now_s)
        while self._ends and self._ends[0][0] <= self._steps:
            _, _, row = heapq.heappop(self._ends)
            self._register(row.job, row.blocks)
            self.pool.release(row.blocks)
            self._slots.give_back(row.slot)
            self._context -= row.job.num_context + row.job.num_steps
            change.left.append(row.job)
        self._slots.drain_released()
        if not self._ends or self._boundary_s >= now_s:
            # Not in the middle of a step.
            self._join()
            self._begin_chunks(now_s)
        return change

    def _account(self, count: int) -> None:
        self._boundary_s += self._duration_s(count)
        self._context += count * len(self._ends)
        self._steps += count

    def _begin_chunks(self, now_s: float) -> None:
        """The next step computes chunks of prompts too, where there are some."""
        self._may_compute = False
        if not self._local.has_work:
            return
        chunks = self._local.plan(len(self._ends), now_s)
        if chunks:
            compute_s = self._profile.step_s((chunk.start, chunk.end) for chunk in chunks)
            if self._ends:
                # The weights are read once.
                compute_s = max(compute_s, self._base_s) + self._rows_s(self._context)
            self._chunks_s = self._slowdown * compute_s

    def _end_chunks(self, change: DecodeChange) -> None:
        self._boundary_s += self._chunks_s
        self._context += len(self._ends)
        self._steps += 1
        computed = self._local.finish(self._chunks_s, len(self._ends))
        self._chunks_s = 0.0
        for prompt in computed:
            self._enter(self._locals.pop(prompt.job.number), prompt.blocks, prompt.slot)
            change.prefilled.append(prompt.job)

    def view(self, now_s: float) -> WorkerView:
        """Its load report at `now_s`, whether or not each step was an event."""
        ledger = self.pool.ledger()
        is_decoding = self._ends and not self._chunks_s
        context = self._context + (self._steps_by(now_s) * len(self._ends) if is_decoding else 0)
        return WorkerView(
            worker_id=self.worker_id,
            role=Role.DECODE,
            fingerprint=LAYOUT,
            num_waiting=len(self._waiting) + self._local.num_waiting,
            num_running=len(self._ends) + self._local.num_computing,
            waiting_tokens=self._local.waiting_tokens,
            free_blocks=ledger.free,
            cached_blocks=ledger.cached,
            total_blocks=ledger.total,
            booked_blocks=sum(job.num_blocks for job in self._waiting),
            prefill_tokens_per_s=self._local.fit.tokens_per_s,
            prefill_curve_s=self._local.fit.curve_s,
            decode_step_s=self._slowdown * (self._base_s + self._rows_s(context)),
            decode_base_s=self._slowdown * (self._base_s + self._per_token_s * context),
            decode_row_s=self._slowdown * self._per_row_s,
            transfer_bytes_per_s=self._link_bytes_per_s,
            max_num_seqs=self._max_num_seqs,
        )

    def _join(self) -> None:
        while self._can_join():
            job = self._waiting.popleft()
            found = self.pool.find_prefix(job.hashes)
            self.pool.acquire(found)
            fresh = self.pool.allocate(job.num_blocks - len(found))
            slot = self._slots.take()
            assert fresh is not None, "_can_join counted them"
            assert slot is not None, "_can_join has looked"
            self._enter(job, found + fresh, slot)

    def _enter(self, job: DecodeJob, blocks: list[int], slot: int) -> None:
        self._context += job.num_context
        # Its prompt's KV is here: others may find it while it decodes.
        self._register(job, blocks[: job.num_context // self.block_tokens])
        heapq.heappush(self._ends, (self._steps + job.num_steps, job.number, _Row(job, blocks, slot)))

    def _register(self, job: DecodeJob, blocks: Sequence[int]) -> None:
        for block, name in zip(blocks, job.hashes, strict=False):
            self.pool.register(block, name)

    def publish(self, index: PrefixIndex) -> None:
        """Tells the index what changed in the cache."""
        if events := self.pool.drain_events():
            index.apply(self.worker_id, EPOCH, self._next_sequence, events)
            self._next_sequence += len(events)

    # -- prompts whose prefix is fetched ------------------------------------------------------------------------------

    @property
    def fit(self) -> PrefillFit:
        return self._local.fit

    def drain_granted(self) -> list[tuple[PrefillJob, PrefixFetch]]:
        return self._local.drain_granted()

    def landed(self, fetch: PrefixFetch, blocks: Sequence[int]) -> None:
        self._local.landed(fetch, blocks)

    def end_fetch(self, job: PrefillJob, fetch: PrefixFetch, shares: Sequence[FetchedShare], tier: str) -> None:
        self._local.end_fetch(job, fetch, shares, tier)

    # -- what steps take ----------------------------------------------------------------------------------------------

    def _rows_s(self, context: int) -> float:
        return self._per_row_s * len(self._ends) + self._per_token_s * context

    def _duration_s(self, count: int) -> float:
        step_s = self._base_s + self._rows_s(self._context)
        growing_s = self._per_token_s * len(self._ends) * count * (count - 1) / 2
        return self._slowdown * (count * step_s + growing_s)

    def _steps_until_change(self, now_s: float) -> int:
        # Between two steps a prompt is begun at once.
        least = 0 if self._may_compute and self._boundary_s >= now_s else 1
        if self._stepwise:
            return least
        until_leave = self._ends[0][0] - self._steps
        if not (self._can_join() or self._local.has_work):
            return until_leave
        return min(until_leave, max(least, self._steps_covering(now_s - self._boundary_s)))

    def _can_join(self) -> bool:
        if not self._waiting or not len(self._slots):
            return False
        job = self._waiting[0]
        found = self.pool.find_prefix(job.hashes)
        # Those of the prefix that nobody holds are counted as available, and are not to be had twice.
        idle = sum(self.pool.state(block) is BlockState.CACHED for block in found)
        return job.num_blocks - len(found) <= self.pool.num_available - idle - self._local.num_promised

    def _steps_by(self, now_s: float) -> int:
        """Whole steps that have ended by `now_s`, no further than where somebody leaves."""
        most = self._ends[0][0] - self._steps
        count = min(most, self._steps_covering(now_s - self._boundary_s))
        return count if self._boundary_s + self._duration_s(count) <= now_s else max(0, count - 1)

    def _steps_covering(self, seconds: float) -> int:
        """The least number of steps that takes `seconds` or more."""
        if seconds <= 0.0:
            return 0
        # b B / 2 n^2 + (a + b C - b B / 2) n - seconds = 0, by the root formula that keeps its digits.
        square = self._slowdown * self._per_token_s * len(self._ends) / 2
        linear = self._slowdown * (self._base_s + self._rows_s(self._context)) - square
        root = 2 * seconds / (linear + math.sqrt(linear * linear + 4 * square * seconds))
        count = max(0, math.floor(root) - 1)
        # A time that was made of steps covers these, however it was rounded.
        while self._duration_s(count) < seconds * (1.0 - 1e-12):
            count += 1
        return count

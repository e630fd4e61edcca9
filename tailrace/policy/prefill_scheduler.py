"""The prefill worker's schedule: prompts in chunks under a token budget, first come, first served in each priority.

A request is waiting (no blocks), running (all its blocks, partly computed) or held (computed, its blocks lent until its
needer has pulled them). Held blocks are the buffer between prefill and decode; it is bounded by half the pool.

One step may be planned behind another that still computes.
"""

import heapq
from dataclasses import dataclass, field

from tailrace.kv.block_pool import BlockPool
from tailrace.plan import Chunk, SequenceStart, StepOutput, StepPlan
from tailrace.policy.flights import Flights
from tailrace.policy.request import DrawnToken, Request, StopRule, blocks_for
from tailrace.policy.slots import Slots


@dataclass(slots=True, eq=False)
class PrefillJob:
    """A request with its blocks: `num_computed` tokens have their KV written, `num_ready` blocks all of theirs."""

    request: Request
    slot: int
    """-1: it was dropped. A step in flight may still compute it."""
    blocks: list[int]
    num_planned: int
    """As num_computed, once the steps in flight are over."""
    num_computed: int
    num_ready: int
    num_cached_tokens: int
    first_tokens: tuple[DrawnToken, ...] = ()

    @property
    def is_computed(self) -> bool:
        return self.num_computed == len(self.request.tokens)


@dataclass(slots=True)
class PrefillStep:
    """What one step changed, by request id."""

    progressed: list[PrefillJob] = field(default_factory=list)
    """More blocks are ready, or all is computed."""
    computed_tokens: int = 0


class PrefillScheduler:
    """Owns the requests of a prefill worker; `pool` is written here only."""

    def __init__(
        self, pool: BlockPool, *, block_size: int, max_num_seqs: int, max_num_batched_tokens: int, stop: StopRule
    ) -> None:
        self._pool = pool
        self._block_size = block_size
        self._budget = max_num_batched_tokens
        self._slots = Slots(max_num_seqs)
        self._stop = stop
        self._waiting: list[tuple[tuple[int, int], Request]] = []
        self._cancelled_waiting: set[int] = set()
        self._running: dict[int, PrefillJob] = {}
        self._held: dict[int, PrefillJob] = {}
        self._flights: Flights[list[PrefillJob]] = Flights(pool)
        self._waiting_tokens = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) - len(self._cancelled_waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def waiting_tokens(self) -> int:
        """Accepted and not computed yet."""
        return self._waiting_tokens + sum(len(j.request.tokens) - j.num_computed for j in self._running.values())

    def fits(self, num_tokens: int) -> bool:
        """Could a prompt of this length ever be held?"""
        return blocks_for(num_tokens, self._block_size) <= self._pool.num_blocks

    def submit(self, request: Request) -> None:
        heapq.heappush(self._waiting, (request.rank, request))
        self._waiting_tokens += len(request.tokens)

    def job(self, request_id: int) -> PrefillJob | None:
        return self._running.get(request_id) or self._held.get(request_id)

    def jobs(self) -> list[PrefillJob]:
        """Running, then held."""
        return [*self._running.values(), *self._held.values()]

    def drop(self, request_id: int) -> None:
        """Cancelled, or pulled: give everything back. Unknown ids are fine: a request may end twice."""
        if (job := self._running.pop(request_id, None)) is not None:
            self._slots.give_back(job.slot)
            job.slot = -1
            self._flights.release(job.blocks)
        elif (job := self._held.pop(request_id, None)) is not None:
            self._pool.unlend(job.blocks)
        else:
            self._drop_waiting(request_id)

    def _drop_waiting(self, request_id: int) -> None:
        for _, request in self._waiting:
            if request.id == request_id and request_id not in self._cancelled_waiting:
                self._cancelled_waiting.add(request_id)
                self._waiting_tokens -= len(request.tokens)

    def schedule(self) -> StepPlan:
        """Continue what runs, then admit what waits, until the token budget is used.

        May be called once more before `finish`.
        """
        jobs = [job for job in self._running.values() if job.num_planned < len(job.request.tokens)]
        chunks: list[Chunk] = []
        budget = self._budget
        for job in jobs:
            if budget == 0:
                break
            budget -= self._add_chunk(job, budget, chunks)
        started: list[SequenceStart] = []
        while budget > 0 and (admitted := self._admit()) is not None:
            started.append(self._start(admitted))
            budget -= self._add_chunk(admitted, budget, chunks)
            jobs.append(admitted)
        plan = StepPlan(released=self._slots.drain_released(), started=started, chunks=chunks)
        if plan.changes_anything:
            self._begin(plan, jobs[: len(chunks)])
        return plan

    def _add_chunk(self, job: PrefillJob, budget: int, chunks: list[Chunk]) -> int:
        start, total = job.num_planned, len(job.request.tokens)
        end = job.num_planned = min(total, start + budget)
        chunks.append(Chunk(job.slot, start, end, job.request.choices if end == total else ()))
        return end - start

    def _begin(self, plan: StepPlan, jobs: list[PrefillJob]) -> None:
        promised = (
            block_hash
            for job, chunk in zip(jobs, plan.chunks, strict=True)
            for block_hash in job.request.hashes[chunk.start // self._block_size : chunk.end // self._block_size]
        )
        self._flights.begin(plan, jobs, frozenset(promised))

    def _start(self, job: PrefillJob) -> SequenceStart:
        request = job.request
        return SequenceStart(
            slot=job.slot,
            tokens=request.tokens,
            num_prompt_tokens=request.num_prompt_tokens,
            sampling=request.sampling,
            choice=request.choices[0],
            blocks=list(job.blocks),
        )

    def _may_admit(self) -> bool:
        held = sum(len(job.blocks) for job in self._held.values())
        return len(self._slots) > 0 and (held <= self._pool.num_blocks // 2 or not self._held)

    def _admit(self) -> PrefillJob | None:
        """Head of the line only: a prompt that does not fit is not overtaken by a smaller one."""
        self._forget_cancelled()
        if not self._waiting or not self._may_admit():
            return None
        request = self._waiting[0][1]
        table = self._claim(request)
        if table is None:
            return None
        heapq.heappop(self._waiting)
        self._waiting_tokens -= len(request.tokens)
        slot = self._slots.take()
        assert slot is not None, "_may_admit counted the slots"
        blocks, num_cached = table
        computed = num_cached * self._block_size
        job = PrefillJob(request, slot, blocks, computed, computed, num_cached, computed)
        self._running[request.id] = job
        return job

    def _forget_cancelled(self) -> None:
        while self._waiting and self._waiting[0][1].id in self._cancelled_waiting:
            self._cancelled_waiting.remove(heapq.heappop(self._waiting)[1].id)

    def _claim(self, request: Request) -> tuple[list[int], int] | None:
        """Blocks for the whole prompt, cached ones first. At least one token is left to compute: somebody must draw."""
        reusable = (len(request.tokens) - 1) // self._block_size
        cached = self._pool.find_prefix(request.hashes[:reusable])
        if self._flights.will_find(request.hashes[:reusable], len(cached)):
            return None
        self._pool.acquire(cached)
        fresh = self._pool.allocate(blocks_for(len(request.tokens), self._block_size) - len(cached))
        if fresh is None:
            self._pool.release(cached)
            return None
        return [*cached, *fresh], len(cached)

    def finish(self, plan: StepPlan, out: StepOutput) -> PrefillStep:
        """Book what the runner did: blocks become findable, computed requests become held."""
        step = PrefillStep(computed_tokens=plan.num_tokens)
        row = 0
        for job, chunk in zip(self._flights.end(plan), plan.chunks, strict=True):
            first, row = row, row + len(chunk.choices)
            if job.slot < 0:
                continue
            job.num_computed = chunk.end
            self._mark_ready(job)
            if chunk.choices:
                self._complete(job, out, first)
            step.progressed.append(job)
        return step

    def _mark_ready(self, job: PrefillJob) -> None:
        full = job.num_computed // self._block_size
        for index in range(job.num_ready, full):
            self._pool.register(job.blocks[index], job.request.hashes[index])
        job.num_ready = len(job.blocks) if job.is_computed else full

    def _complete(self, job: PrefillJob, out: StepOutput, row: int) -> None:
        request = job.request
        job.first_tokens = tuple(
            DrawnToken(
                choice,
                out.tokens[at],
                out.logprobs[at] if out.logprobs is not None else None,
                self._stop.finish_reason(out.tokens[at], len(request.tokens) + 1, request),
                at in out.bad_rows,
            )
            for at, choice in enumerate(request.choices, start=row)
        )
        del self._running[request.id]
        self._slots.give_back(job.slot)
        self._pool.lend(job.blocks)
        self._pool.release(job.blocks)
        self._held[request.id] = job

"""The prefill worker's schedule: prompts in chunks under a token budget, first come, first served in each priority.

A request is waiting (no blocks), fetching (all its blocks, some of them being read from elsewhere), running (all its
blocks, partly computed) or held (computed, its blocks lent until its needer has pulled them). Held blocks are the
buffer between prefill and decode; it is bounded by half the pool.

Who fetches takes no slot and no token of the budget; others compute meanwhile. The next few in line fetch before it is
their turn, and then take it. One step may be planned behind another that still computes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tailrace.kv.block_pool import BlockPool
from tailrace.kv.hashing import parent_of
from tailrace.kv.window import LeadingBlocks, Window
from tailrace.plan import BlockAppend, Chunk, SequenceStart, StepOutput, StepPlan
from tailrace.policy.flights import Flights
from tailrace.policy.line import Line
from tailrace.policy.prefix_fetches import PrefixFetch, PrefixFetches
from tailrace.policy.prompt_tables import PromptTables
from tailrace.policy.request import DrawnToken, Request, StopRule, blocks_for
from tailrace.policy.slots import Slots

LOOK_AHEAD = 8
"""So many of the line may fetch before it is their turn: a fetch that is worth its while is much shorter than what the
computing of so many takes."""


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
    num_found: int
    """Leading blocks that were here; what else is cached was fetched."""
    num_gone: int = 0
    """Leading entries of `blocks` that lie before the window of its next token, and are no longer its own."""
    first_tokens: tuple[DrawnToken, ...] = ()

    @property
    def held(self) -> list[int]:
        """Those of `blocks` that it refers to, or lends."""
        return self.blocks[self.num_gone :]

    @property
    def is_computed(self) -> bool:
        return self.num_computed == len(self.request.tokens)


@dataclass(slots=True)
class PrefillStep:
    """What one step changed, by request id."""

    progressed: list[PrefillJob] = field(default_factory=list)
    """More blocks are ready, or all is computed."""
    computed_tokens: int = 0
    let_go: list[int] = field(default_factory=list)
    """Blocks that are before the window of those that go on."""


@dataclass(slots=True)
class _Chunks:
    """Of the step that is being planned, and whose they are."""

    jobs: list[PrefillJob] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    appended: list[BlockAppend] = field(default_factory=list)
    num_tokens: int = 0


class PrefillScheduler:
    """Owns the requests of a prefill worker; `pool` is written here only."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        stop: StopRule,
        window: int = 0,
    ) -> None:
        """`window`: KVLayout.window."""
        self._pool = pool
        self._block_size = block_size
        self._budget = max_num_batched_tokens
        self._slots = Slots(max_num_seqs)
        self._stop = stop
        self._line: Line[Request] = Line()
        self._aside: list[Request] = []
        """Out of the line until a fetch ends: it brings what they lack first."""
        self._window = Window(window, block_size)
        self._tables = PromptTables(pool, self._window, max_num_batched_tokens)
        self._fetches = PrefixFetches(self._tables)
        self._running: dict[int, PrefillJob] = {}
        self._held: dict[int, PrefillJob] = {}
        self._flights: Flights[list[PrefillJob]] = Flights(pool)
        self._waiting_tokens = 0

    @property
    def num_waiting(self) -> int:
        return len(self._line) + len(self._aside) + len(self._fetches)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def waiting_tokens(self) -> int:
        """Accepted and not computed yet; without what is being fetched."""
        running = sum(len(j.request.tokens) - j.num_computed for j in self._running.values())
        aside = sum(len(request.tokens) for request in self._aside)
        return self._waiting_tokens + self._fetches.num_tokens + aside + running

    def fits(self, num_tokens: int) -> bool:
        """Could a prompt of this length ever be held?"""
        return self._window.least_held(num_tokens) <= self._pool.num_blocks

    def submit(self, request: Request, elsewhere: Sequence[range] = ()) -> None:
        """`elsewhere`: blocks of its chain that others are said to hold, to be fetched where they are not here."""
        self._fetches.offer(request.id, elsewhere)
        self._line_up(request)

    def _line_up(self, request: Request) -> None:
        self._line.add(request)
        self._waiting_tokens += len(request.tokens)

    def job(self, request_id: int) -> PrefillJob | None:
        return self._running.get(request_id) or self._held.get(request_id)

    def jobs(self) -> list[PrefillJob]:
        """Running, then held."""
        return [*self._running.values(), *self._held.values()]

    def fetching(self) -> list[PrefixFetch]:
        return self._fetches.all()

    def drop(self, request_id: int, in_flight: Sequence[int] = ()) -> None:
        """Cancelled, or pulled: give everything back. Unknown ids are fine: a request may end twice.

        Blocks `in_flight` may still be written by a read; `settle` follows for them.
        """
        self._fetches.forget(request_id)
        if (job := self._running.pop(request_id, None)) is not None:
            self._slots.give_back(job.slot)
            job.slot = -1
            self._flights.release(job.held)
        elif (job := self._held.pop(request_id, None)) is not None:
            self._pool.unlend(job.held)
        elif self._fetches.drop(request_id, in_flight):
            self._return_aside()
        else:
            self._drop_waiting(request_id)

    def _drop_waiting(self, request_id: int) -> None:
        self._aside = [request for request in self._aside if request.id != request_id]
        for request in self._line.all():
            if request.id == request_id:
                self._leave_line(request)

    # -- fetches ------------------------------------------------------------------------------------------------------

    def drain_granted(self) -> list[PrefixFetch]:
        """Whose reads may begin since the last call. Each ends with `end_fetch` or `drop`."""
        return self._fetches.drain_granted()

    def landed(self, request_id: int, blocks: Sequence[int]) -> None:
        """A read into these blocks ended well."""
        self._fetches.landed(request_id, blocks)
        self._return_aside()

    def end_fetch(self, request_id: int, in_flight: Sequence[int] = ()) -> None:
        """Nothing more comes. Blocks `in_flight` may still be written: the request gets others, and fetches no more."""
        if (late := self._fetches.end(request_id, in_flight)) is not None:
            self._line_up(late.request)
        self._return_aside()

    def settle(self, blocks: Sequence[int]) -> None:
        """The read that kept these blocks is over, and nobody wants them."""
        self._pool.abandon_landing(blocks)

    def quarantine(self, blocks: Sequence[int]) -> None:
        """A read that is late may still write these blocks."""
        self._pool.quarantine(blocks)

    def _return_aside(self) -> None:
        aside, self._aside = self._aside, []
        for request in aside:
            self._line_up(request)

    # -- steps --------------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Continue what runs and what was fetched, in order of rank; then admit what waits, until the budget is used.

        Whoever is fetched for waits for those before it in line, unless the first of them cannot start. May be called
        once more before `finish`.
        """
        jobs = [job for job in self._running.values() if job.num_planned < len(job.request.tokens)]
        started = [self._start(job) for job in self._go_on(jobs)]
        work = _Chunks()
        for job in jobs:
            if work.num_tokens == self._budget:
                break
            if grown := self._tables.grow(job, len(job.request.tokens)):
                work.appended.append(BlockAppend(job.slot, len(job.blocks) - len(grown), grown))
            self._add_chunk(job, work)
        while (admitted := self._next(self._budget - work.num_tokens)) is not None:
            started.append(self._start(admitted))
            self._add_chunk(admitted, work)
            jobs.append(admitted)
        if jobs and not work.jobs and not self._flights:
            # Each waits for blocks that others share with whoever let go of them.
            self._give_way(max(jobs, key=lambda job: job.request.rank))
            return self.schedule()
        self._fetch_ahead()
        released = self._slots.drain_released()
        plan = StepPlan(released=released, started=started, appended=work.appended, chunks=work.chunks)
        if plan.changes_anything:
            self._begin(plan, work.jobs)
        return plan

    def _give_way(self, job: PrefillJob) -> None:
        """It is computed again from what is still cached of it."""
        self.drop(job.request.id)
        self._line_up(job.request)

    def _go_on(self, jobs: list[PrefillJob]) -> list[PrefillJob]:
        """Those whose prefix has come, before whom nobody waits and for whom something of the budget is left: put among
        `jobs`, and returned."""
        fetched: list[PrefillJob] = []
        while len(self._slots) and (ended := self._fetches.first_ended()) is not None:
            if (head := self._line.head) is not None and head.rank < ended.request.rank:
                break
            before = [job for job in jobs if job.request.rank < ended.request.rank]
            if sum(len(job.request.tokens) - job.num_planned for job in before) >= self._budget:
                break
            fetched.append(self._take(ended))
            jobs.append(fetched[-1])
        jobs.sort(key=lambda job: job.request.rank)
        return fetched

    def _add_chunk(self, job: PrefillJob, work: "_Chunks") -> None:
        """As far as its blocks and the budget go."""
        start, total = job.num_planned, len(job.request.tokens)
        end = min(total, start + self._budget - work.num_tokens, len(job.blocks) * self._block_size)
        if end > start:
            job.num_planned = end
            work.jobs.append(job)
            work.chunks.append(Chunk(job.slot, start, end, job.request.choices if end == total else ()))
            work.num_tokens += end - start

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

    def _next(self, budget: int) -> PrefillJob | None:
        """Of the line and of those whose prefix has come, whoever is first and can start."""
        ended = self._fetches.first_ended()
        admitted = self._admit(budget, ended.request.rank if ended is not None else None)
        if admitted is not None or ended is None or budget == 0 or not len(self._slots):
            return admitted
        return self._take(ended)

    def _take(self, ended: PrefixFetch) -> PrefillJob:
        self._fetches.take(ended)
        return self._run(ended.request, LeadingBlocks(ended.blocks, ended.num_gone), ended.num_ready, ended.num_found)

    def _admit(self, budget: int, before: tuple[int, int] | None) -> PrefillJob | None:
        """From the line, of a rank lower than `before`. Lets its head fetch even when there is no budget left.

        Head of the line only: a prompt that does not fit is not overtaken by a smaller one.
        """
        while (request := self._line.head) is not None and self._has_buffer():
            if before is not None and request.rank > before:
                return None
            reusable, found = self._find(request)
            if self._flights.will_find(reusable, len(found)):
                return None
            if self._fetches.will_find(reusable, len(found)):
                self._leave_line(request)
                self._aside.append(request)
                continue
            end = self._fetches.reach(request.id, len(found), len(reusable))
            if end == len(found):
                return self._start_at_once(request, found) if budget > 0 and len(self._slots) else None
            if not self._fetches.claim(request, found, end):
                return None
            self._leave_line(request)
        return None

    def _fetch_ahead(self) -> None:
        """Lets the next few in line fetch while others compute.

        Each holds its whole table from then on, as the head would, and leaves those before it all that they will need:
        what they would find here, and blocks for the rest. So nobody waits for who came later. Not with a window, where
        those that run need more blocks as they go.
        """
        if self._window.tokens or not self._fetches.has_offers or not self._has_buffer():
            return
        found_before: list[LeadingBlocks] = []
        num_missing = 0
        for request in self._line.first(LOOK_AHEAD):
            reusable, found = self._find(request)
            num_blocks = blocks_for(len(request.tokens), self._block_size)
            num_needed = num_blocks - len(found)
            is_coming = self._flights.will_find(reusable, len(found)) or self._fetches.will_find(reusable, len(found))
            may_go = not is_coming and self._fetches.may_go_ahead(request)
            if may_go and self._pool.num_available >= num_needed + num_missing:
                end = self._fetches.reach(request.id, len(found), len(reusable))
                if end > len(found) and self._claim_behind(found_before, num_missing, request, found, end):
                    self._leave_line(request)
                    continue
            found_before.append(found)
            num_missing += num_needed

    def _claim_behind(
        self, found_before: list[LeadingBlocks], num_missing: int, request: Request, found: LeadingBlocks, end: int
    ) -> bool:
        for table in found_before:
            self._pool.acquire(table.needed)
        is_claimed = self._fetches.claim(request, found, end, spare=num_missing)
        for table in found_before:
            self._pool.release(table.needed)
        return is_claimed

    def _find(self, request: Request) -> tuple[list[bytes], LeadingBlocks]:
        """What it could reuse, and the blocks of it that are here.

        At least one token is left to compute: somebody must draw.
        """
        reusable = request.hashes[: (len(request.tokens) - 1) // self._block_size]
        return reusable, self._window.find(self._pool, reusable)

    def _has_buffer(self) -> bool:
        held = sum(len(job.held) for job in self._held.values())
        return held <= self._pool.num_blocks // 2 or not self._held

    def _leave_line(self, request: Request) -> None:
        if request is self._line.head:
            self._line.pop()
        else:
            self._line.discard(request)
        self._waiting_tokens -= len(request.tokens)

    def _start_at_once(self, request: Request, found: LeadingBlocks) -> PrefillJob | None:
        """Its blocks, those that were found first. None: the pool cannot give them."""
        table = self._tables.claim(len(request.tokens), found)
        if table is None:
            return None
        self._leave_line(request)
        self._fetches.forget(request.id)
        return self._run(request, table, len(found), len(found))

    def _run(self, request: Request, table: LeadingBlocks, num_ready: int, num_found: int) -> PrefillJob:
        slot = self._slots.take()
        assert slot is not None, "callers look first"
        done = num_ready * self._block_size
        job = PrefillJob(request, slot, table.blocks, done, done, num_ready, done, num_found, table.num_gone)
        self._running[request.id] = job
        return job

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
            # Of a whole prompt that is kept which its last token needs: so much is handed over.
            if leaving := self._window.let_go(job, chunk.end - 1 if job.is_computed else chunk.end):
                self._flights.release(leaving)
                step.let_go += leaving
            if chunk.choices:
                self._complete(job, out, first)
            step.progressed.append(job)
        if step.progressed:
            # What others fetch for them may have been computed here.
            self._return_aside()
        return step

    def _mark_ready(self, job: PrefillJob) -> None:
        full = job.num_computed // self._block_size
        for index in range(job.num_ready, full):
            hashes = job.request.hashes
            self._pool.register(job.blocks[index], hashes[index], parent_of(hashes, index), job.request.tenant)
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
        self._pool.lend(job.held)
        self._pool.release(job.held)
        self._held[request.id] = job

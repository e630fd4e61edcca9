"""Prompts that a simulated decode worker computes itself: admitted, fetched and cut into chunks by the worker's own
LocalPrefill.

A simulated sequence holds its blocks for its whole life. What it needs beyond its prompt is promised to it before it is
admitted, and nobody else gets it, so that whoever has been computed goes on at once.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from tailrace.kv.block_pool import BlockPool
from tailrace.kv.window import Window
from tailrace.plan import Chunk, StepPlan
from tailrace.policy.estimates import PrefillFit
from tailrace.policy.flights import Flights
from tailrace.policy.local_prefill import LocalPrefill
from tailrace.policy.prefix_fetches import PrefixFetch
from tailrace.policy.request import Request, blocks_for
from tailrace.policy.running import DecodeRows, PlannedRows
from tailrace.policy.sequence import Sequence as Prompt
from tailrace.policy.slots import Slots
from tailrace.sim.prefill import SAMPLING, FetchedShare, PrefillJob
from tailrace.worker.rates import FIT_FORGET, FIT_SPREAD


@dataclass(frozen=True, slots=True)
class LocalJob:
    job: PrefillJob
    num_blocks: int
    """Of its whole life, no less than its prompt's."""


@dataclass(frozen=True, slots=True)
class ComputedPrompt:
    job: PrefillJob
    blocks: list[int]
    """For its whole life; those that are full of the prompt are registered."""
    slot: int


class LocalPrompts:
    """`plan` between two steps, `finish` when the step that it planned is over. The slots are all of the worker's."""

    def __init__(self, pool: BlockPool, slots: Slots, block_tokens: int, chunk_tokens: int) -> None:
        self.fit = PrefillFit(FIT_FORGET, FIT_SPREAD)
        self._pool = pool
        self._block_tokens = block_tokens
        self._chunk_tokens = chunk_tokens
        self._flights: Flights[PlannedRows] = Flights(pool)
        self._prefill = LocalPrefill(pool, slots, self._flights, Window(0, block_tokens), chunk_tokens, None)
        self._waiting: deque[LocalJob] = deque()
        """Not in LocalPrefill's line yet, for what is promised must be there when nobody runs."""
        self._promised: dict[int, LocalJob] = {}
        """In that line, or fetching: their prompts' blocks are claimed there, the rest is promised."""
        self._jobs: dict[int, LocalJob] = {}
        self._plan: StepPlan | None = None

    @property
    def num_promised(self) -> int:
        """Blocks that are to stay available."""
        return sum(self._rest(local) for local in self._promised.values())

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + self._prefill.num_waiting

    @property
    def num_computing(self) -> int:
        return len(self._prefill.computing)

    @property
    def waiting_tokens(self) -> int:
        return self._prefill.waiting_tokens + sum(local.job.request.num_prompt_tokens for local in self._waiting)

    @property
    def has_work(self) -> bool:
        """Somebody waits or computes."""
        return bool(self._jobs)

    def submit(self, local: LocalJob) -> None:
        self._jobs[local.job.number] = local
        self._waiting.append(local)

    def plan(self, num_rows: int, now_s: float) -> Sequence[Chunk]:
        """The chunks of a step that decodes `num_rows` sequences too; none: nothing can be computed now."""
        self._fill_line()
        work = self._prefill.plan(self._chunk_tokens - num_rows, spare=self.num_promised)
        for prompt in self._prefill.computing:
            if (local := self._promised.pop(prompt.request.id, None)) is not None:
                self._start(local, prompt, now_s)
        if not work.chunks:
            return ()
        promised = [
            name
            for prompt, chunk in zip(work.prompts, work.chunks, strict=True)
            for name in prompt.hashes[chunk.start // self._block_tokens : chunk.end // self._block_tokens]
        ]
        self._plan = StepPlan(chunks=work.chunks)
        self._flights.begin(self._plan, PlannedRows(DecodeRows.of([]), work.prompts), frozenset(promised))
        return work.chunks

    def finish(self, seconds: float, num_rows: int) -> list[ComputedPrompt]:
        """The step has taken `seconds`, with so many rows; the prompts that it has computed."""
        assert self._plan is not None, "callers finish what they planned"
        plan, self._plan = self._plan, None
        if not num_rows:
            self.fit.add_step(((chunk.start, chunk.end) for chunk in plan.chunks), seconds)
        computed: list[ComputedPrompt] = []
        for prompt, chunk in zip(self._flights.end(plan).prompts, plan.chunks, strict=True):
            size = self._block_tokens
            for index in range(prompt.num_computed // size, chunk.end // size):
                self._pool.register(prompt.blocks[index], prompt.hashes[index])
            prompt.num_computed = chunk.end
            if chunk.end == len(prompt.tokens):
                self._prefill.computing.remove(prompt)
                job = self._jobs.pop(prompt.request.id).job
                computed.append(ComputedPrompt(job, prompt.blocks, prompt.slot))
        return computed

    def _fill_line(self) -> None:
        while self._waiting and self._has_room_for(self._waiting[0]):
            local = self._waiting.popleft()
            request = local.job.request
            # Of the tokens the schedule looks at their number only.
            tokens = cast("list[int]", range(request.num_prompt_tokens))
            hashes = list(request.full_hashes(self._block_tokens))
            # A source is said to hold all of the chain up to its last block.
            elsewhere = [range(source.first_block + source.num_blocks) for source in local.job.sources]
            asked = Request(local.job.number, tokens, request.num_prompt_tokens, SAMPLING, hashes=hashes)
            self._promised[local.job.number] = local
            self._prefill.line.add(Prompt(asked, asked.choices, tokens, hashes, elsewhere=elsewhere))

    def _has_room_for(self, local: LocalJob) -> bool:
        """In a pool that nobody else uses: what is promised to all would be there."""
        all_blocks = sum(each.num_blocks for each in self._promised.values()) + local.num_blocks
        return not self._promised or all_blocks <= self._pool.num_blocks

    def _start(self, local: LocalJob, prompt: Prompt, now_s: float) -> None:
        rest = self._pool.allocate(self._rest(local))
        assert rest is not None, "it was promised"
        prompt.blocks = [*prompt.blocks, *rest]
        local.job.started_s = now_s
        local.job.hit_tokens = prompt.num_computed - local.job.fetched_tokens

    def _rest(self, local: LocalJob) -> int:
        return local.num_blocks - blocks_for(local.job.request.num_prompt_tokens, self._block_tokens)

    # -- fetching -----------------------------------------------------------------------------------------------------

    def drain_granted(self) -> list[tuple[PrefillJob, PrefixFetch]]:
        """Requests whose prefix can be read now; each once, and ends with `end_fetch`."""
        swaps = self._prefill.swaps
        return [(self._jobs[swaps.request_of(fetch.request.id)].job, fetch) for fetch in swaps.drain_granted()]

    def landed(self, fetch: PrefixFetch, blocks: Sequence[int]) -> None:
        self._prefill.swaps.landed(fetch.request.id, blocks)

    def end_fetch(self, job: PrefillJob, fetch: PrefixFetch, shares: Sequence[FetchedShare], tier: str) -> None:
        """Nothing more comes: what has not is computed. `tier`: where most of it was."""
        job.end_fetch(fetch, shares, tier, self._block_tokens)
        self._prefill.end_swap(fetch.request.id, ())

"""A prefill worker's surroundings: gateways that submit and cancel, needers that come late, early or never."""

from collections.abc import Sequence

from tailrace.kv.block_pool import BlockPool, BlockState
from tailrace.plan import StepPlan
from tailrace.policy.prefill_scheduler import PrefillJob, PrefillScheduler, PrefillStep
from tailrace.policy.prefix_fetches import PrefixFetch
from tailrace.policy.request import DrawnToken, Request, StopRule
from tests.helpers.decode_world import check_tenants, expected, make_request
from tests.helpers.fake_runner import EOS, FakeRunner, FakeStep, digests


class PrefillWorld:
    """Drives a PrefillScheduler as the prefill worker does, and holds every prompt against the truth."""

    def __init__(
        self,
        *,
        num_blocks: int = 16,
        block_size: int = 4,
        max_num_seqs: int = 4,
        budget: int = 16,
        max_model_len: int | None = None,
        prefix_caching: bool = True,
        overlap: bool = False,
        window: int = 0,
    ) -> None:
        """`overlap`: a step is planned and launched before the one before it is finished."""
        self.overlap = overlap
        self.ahead: tuple[StepPlan, FakeStep] | None = None
        self.block_size = block_size
        self.budget = budget
        self.max_model_len = max_model_len or num_blocks * block_size
        self.pool = BlockPool(num_blocks, epoch=1, prefix_caching=prefix_caching)
        self.runner = FakeRunner(self.pool, block_size=block_size, max_num_seqs=max_num_seqs, window=window)
        self.scheduler = PrefillScheduler(
            self.pool,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            stop=StopRule(frozenset({EOS}), self.max_model_len),
            window=window,
        )
        self.requests: dict[int, Request] = {}
        self.waiting: set[int] = set()
        self.dropped: set[int] = set()
        self.done: dict[int, tuple[DrawnToken, ...]] = {}
        self.max_held = 0
        self.reads: dict[int, list[tuple[int, int]]] = {}
        """Of each request that fetches: (block, place in its chain) of what has not been read yet."""
        self.fetched: set[int] = set()
        """Those that left the line to fetch, and have not come back to it."""
        self.num_fetched_ahead = 0
        """Those that began while others were before them in line."""
        self.late: list[list[int]] = []
        """Blocks that reads may still write for nobody."""

    def submit(self, tokens: Sequence[int], elsewhere: Sequence[range] = (), **options: object) -> Request:
        request_id = len(self.requests) + 1
        request = make_request(request_id, tokens, block_size=self.block_size, **options)  # type: ignore[arg-type]
        self.requests[request_id] = request
        self.waiting.add(request_id)
        self.scheduler.submit(request, elsewhere)
        return request

    def drop(self, request_id: int, num_in_flight: int = 0) -> None:
        """Cancelled; or, when its blocks are held, pulled: then they must still be what was computed.

        `num_in_flight`: blocks that it fetches and that may be written afterwards.
        """
        if (job := self.scheduler.job(request_id)) is not None:
            self.check_ready_blocks(job)
        self.waiting.discard(request_id)
        self.dropped.add(request_id)
        self.scheduler.drop(request_id, self._leave_late(request_id, num_in_flight))

    # -- what is fetched ----------------------------------------------------------------------------------------------

    def fetch(self, request_id: int) -> PrefixFetch:
        return next(fetch for fetch in self.scheduler.fetching() if fetch.request.id == request_id)

    def land(self, request_id: int, count: int = 1000, at: int = 0) -> None:
        """Reads of so many blocks end well, from the one numbered `at` on of those that have not."""
        reads = self.reads[request_id]
        done, self.reads[request_id] = reads[at : at + count], [*reads[:at], *reads[at + count :]]
        for block, place in done:
            self.runner.land(block, place, self.requests[request_id].tokens)
        self.scheduler.landed(request_id, [block for block, _ in done])

    def end_fetch(self, request_id: int, num_in_flight: int = 0) -> None:
        """What has not landed is rubbish, or may still be written."""
        in_flight = self._leave_late(request_id, num_in_flight)
        self.scheduler.end_fetch(request_id, in_flight)
        if in_flight:
            self.scheduler.quarantine(in_flight)
        if all(fetch.request.id != request_id for fetch in self.scheduler.fetching()):
            self.fetched.remove(request_id)

    def _leave_late(self, request_id: int, count: int) -> list[int]:
        reads = self.reads.pop(request_id, [])
        for block, _ in reads:
            self.runner.write(block, [-1] * self.block_size)
        late = [block for block, _ in reads[len(reads) - min(count, len(reads)) :]]
        if late:
            self.late.append(late)
        return late

    def write_late(self) -> None:
        """Nothing but rubbish: whoever uses these blocks is found out."""
        for block in (block for late in self.late for block in late):
            self.runner.write(block, [-2] * self.block_size)

    def settle_late(self, at: int = 0) -> None:
        self.scheduler.settle(self.late.pop(at))

    def _take_granted(self) -> None:
        for fetch in self.scheduler.drain_granted():
            assert fetch.request.id not in self.dropped
            self._check_leaves_room(fetch)
            places = range(fetch.num_local, fetch.end)
            self.reads[fetch.request.id] = [(fetch.blocks[place], place) for place in places]

    def _check_leaves_room(self, fetch: PrefixFetch) -> None:
        """Who fetches before it is its turn leaves those before it what they need: found here, or fresh."""
        line = [r for r in self.scheduler._line.all() if r.rank < fetch.request.rank]
        found = [self.pool.find_prefix(r.hashes[: (len(r.tokens) - 1) // self.block_size]) for r in line]
        for blocks in found:
            self.pool.acquire(blocks)
        num_missing = sum(-(-len(r.tokens) // self.block_size) for r in line) - sum(map(len, found))
        if line:
            self.num_fetched_ahead += 1
            assert self.pool.num_available >= num_missing, f"{fetch.request.id} takes what others wait for"
        for blocks in found:
            self.pool.release(blocks)

    def check_findable(self) -> None:
        """Whatever can be found is what its hash says."""
        truths: dict[bytes, list[int]] = {}
        for request in self.requests.values():
            digest = digests(request.tokens)
            for index, block_hash in enumerate(request.hashes):
                truths[block_hash] = digest[index * self.block_size : (index + 1) * self.block_size]
        for block_hash in self.pool.cached_hashes():
            [block] = self.pool.find_prefix([block_hash])
            assert self.runner.read(block) == truths[block_hash], f"block {block} is findable and wrong"

    # -- steps --------------------------------------------------------------------------------------------------------

    def check_ready_blocks(self, job: PrefillJob) -> None:
        """What a needer could read at this moment."""
        size, truth = self.block_size, digests(job.request.tokens)
        for index, block in enumerate(job.blocks[job.num_gone : job.num_ready], start=job.num_gone):
            wanted = truth[index * size : (index + 1) * size]
            assert self.runner.read(block)[: len(wanted)] == wanted, f"block {block} of {job.request.id}"
            assert self.pool.state(block) in (BlockState.ACTIVE, BlockState.LENT)

    def step(self) -> StepPlan:
        """One turn of the engine's thread; the plan that it finished."""
        plan, step = self.ahead or self._launch()
        if self.overlap and plan.changes_anything:
            ahead = self._launch()
            self.ahead = ahead if ahead[0].changes_anything else None
        else:
            self.ahead = None
        if plan.changes_anything:
            self._take(self.scheduler.finish(plan, step.wait()))
        check_tenants(self.pool)
        if plan.is_empty and self.ahead is None:
            assert not self.scheduler.schedule().changes_anything, "the engine would sleep on work"
        return plan

    def _launch(self) -> tuple[StepPlan, FakeStep]:
        plan = self.scheduler.schedule()
        assert plan.num_tokens <= self.budget, f"over budget: {plan}"
        self.fetched.update(fetch.request.id for fetch in self.scheduler.fetching())
        self._check_order(plan)
        self._take_granted()
        # What changes nothing is not launched.
        return plan, self.runner.launch(plan) if plan.changes_anything else FakeStep(self.runner, plan, plan)

    def settle(self) -> None:
        """Turns until the engine's thread would sleep."""
        while not self.step().is_empty or self.ahead is not None:
            pass

    def _check_order(self, plan: StepPlan) -> None:
        """Whoever started had nobody before it in line. Who fetches is out of it, and who waits for another's fetch."""
        slots = {start.slot for start in plan.started}
        running = [job for job in self.scheduler.jobs() if not job.is_computed]
        started = [job.request.id for job in running if job.slot in slots]
        assert len(started) == len(plan.started)
        gave_way = self.requests.keys() - {job.request.id for job in running} - self.done.keys() - self.dropped
        self.waiting |= {*gave_way, *started}
        out = self.fetched | {request.id for request in self.scheduler._aside}
        for request_id in sorted(started, key=lambda at: self.requests[at].rank):
            before = [at for at in self.waiting - out if self.requests[at].rank < self.requests[request_id].rank]
            assert request_id in self.fetched or not before, "overtaken"
            self.waiting.remove(request_id)
            self.fetched.discard(request_id)

    def _take(self, step: PrefillStep) -> None:
        for job in step.progressed:
            assert job.request.id not in self.dropped
            self.check_ready_blocks(job)
            if job.is_computed:
                assert job.num_ready == len(job.blocks)
                assert job.request.id not in self.done
                self.done[job.request.id] = job.first_tokens
        held = sum(len(job.held) for job in self.scheduler.jobs() if job.is_computed)
        self.max_held = max(self.max_held, held)

    def run_to_end(self, limit: int = 1000) -> None:
        """Needers pull whatever is computed; fetches end, each in its own way."""
        for _ in range(limit):
            self.step()
            for request_id in list(self.reads):
                self.land(request_id, request_id % 3)
                self.end_fetch(request_id, request_id % 2)
            if self.late:
                # A prompt may need every block there is.
                self.write_late()
                self.settle_late()
            for job in self.scheduler.jobs():
                if job.is_computed:
                    self.drop(job.request.id)
            if not self.scheduler.num_waiting and not self.scheduler.num_running:
                break
        self.settle()
        while self.late:
            self.write_late()
            self.settle_late()

    def check_answers(self) -> None:
        """Nobody waits or runs any more."""
        self.check_answers_so_far()
        assert self.done.keys() | self.dropped == self.requests.keys(), "somebody was forgotten"

    def check_answers_so_far(self) -> None:
        for request_id, drawn in self.done.items():
            request = self.requests[request_id]
            assert tuple(token.choice for token in drawn) == request.choices
            for token in drawn:
                truth, reason = expected(request, token.choice, self.max_model_len)
                assert token.token_id == truth[0]
                assert token.finish_reason == (reason if len(truth) == 1 else None)

    def check_empty(self) -> None:
        ledger = self.pool.ledger()
        assert ledger.free + ledger.cached == ledger.total, f"leaked: {self.pool!r}"
        scheduler = self.scheduler
        assert (scheduler.num_waiting, scheduler.num_running, scheduler.waiting_tokens) == (0, 0, 0)
        assert not scheduler.jobs()
        assert self.runner.rows.count(None) == len(self.runner.rows)

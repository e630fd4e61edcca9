"""A prefill worker's surroundings: gateways that submit and cancel, needers that come late, early or never."""

from collections.abc import Sequence

from tailrace.kv.block_pool import BlockPool, BlockState
from tailrace.plan import StepPlan
from tailrace.policy.prefill_scheduler import PrefillJob, PrefillScheduler, PrefillStep
from tailrace.policy.request import DrawnToken, Request, StopRule
from tests.helpers.decode_world import expected, make_request
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
    ) -> None:
        """`overlap`: a step is planned and launched before the one before it is finished."""
        self.overlap = overlap
        self.ahead: tuple[StepPlan, FakeStep] | None = None
        self.block_size = block_size
        self.budget = budget
        self.max_model_len = max_model_len or num_blocks * block_size
        self.pool = BlockPool(num_blocks, epoch=1, prefix_caching=prefix_caching)
        self.runner = FakeRunner(self.pool, block_size=block_size, max_num_seqs=max_num_seqs)
        self.scheduler = PrefillScheduler(
            self.pool,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            stop=StopRule(frozenset({EOS}), self.max_model_len),
        )
        self.requests: dict[int, Request] = {}
        self.waiting: set[int] = set()
        self.dropped: set[int] = set()
        self.done: dict[int, tuple[DrawnToken, ...]] = {}
        self.max_held = 0

    def submit(self, tokens: Sequence[int], **options: object) -> Request:
        request_id = len(self.requests) + 1
        request = make_request(request_id, tokens, block_size=self.block_size, **options)  # type: ignore[arg-type]
        self.requests[request_id] = request
        self.waiting.add(request_id)
        self.scheduler.submit(request)
        return request

    def drop(self, request_id: int) -> None:
        """Cancelled; or, when its blocks are held, pulled: then they must still be what was computed."""
        if (job := self.scheduler.job(request_id)) is not None:
            self.check_ready_blocks(job)
        self.waiting.discard(request_id)
        self.dropped.add(request_id)
        self.scheduler.drop(request_id)

    def check_ready_blocks(self, job: PrefillJob) -> None:
        """What a needer could read at this moment."""
        size, truth = self.block_size, digests(job.request.tokens)
        for index, block in enumerate(job.blocks[: job.num_ready]):
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
        if plan.is_empty and self.ahead is None:
            assert not self.scheduler.schedule().changes_anything, "the engine would sleep on work"
        return plan

    def _launch(self) -> tuple[StepPlan, FakeStep]:
        plan = self.scheduler.schedule()
        assert plan.num_tokens <= self.budget, f"over budget: {plan}"
        self._check_order(plan)
        # What changes nothing is not launched.
        return plan, self.runner.launch(plan) if plan.changes_anything else FakeStep(self.runner, plan, plan)

    def settle(self) -> None:
        """Turns until the engine's thread would sleep."""
        while not self.step().is_empty or self.ahead is not None:
            pass

    def _check_order(self, plan: StepPlan) -> None:
        """Whoever started had nobody before it in line."""
        started = [job.request.id for job in self.scheduler.jobs() if job.request.id in self.waiting]
        assert len(started) == len(plan.started)
        for request_id in sorted(started, key=lambda at: self.requests[at].rank):
            assert min(self.waiting, key=lambda at: self.requests[at].rank) == request_id, "overtaken"
            self.waiting.remove(request_id)

    def _take(self, step: PrefillStep) -> None:
        for job in step.progressed:
            assert job.request.id not in self.dropped
            self.check_ready_blocks(job)
            if job.is_computed:
                assert job.num_ready == len(job.blocks)
                assert job.request.id not in self.done
                self.done[job.request.id] = job.first_tokens
        held = sum(len(job.blocks) for job in self.scheduler.jobs() if job.is_computed)
        self.max_held = max(self.max_held, held)

    def run_to_end(self, limit: int = 1000) -> None:
        """Needers pull whatever is computed."""
        for _ in range(limit):
            self.step()
            for job in self.scheduler.jobs():
                if job.is_computed:
                    self.drop(job.request.id)
            if not self.scheduler.num_waiting and not self.scheduler.num_running:
                break
        self.settle()

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

"""A decode worker's surroundings: owners that lend, reads that land when a test says so, clients that go away."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tailrace.kv.block_pool import BlockPool, BlockState
from tailrace.kv.hashing import chain_seed, hash_blocks
from tailrace.kv.window import Window
from tailrace.plan import StepPlan
from tailrace.policy.decode_scheduler import DecodeScheduler
from tailrace.policy.offers import OfferPolicy
from tailrace.policy.request import DrawnToken, Request, StopRule, blocks_for
from tailrace.policy.sequence import DecodeStep
from tailrace.policy.swap import SwapCost
from tailrace.types import FinishReason, SamplingParams, SequenceKey
from tests.helpers.fake_runner import EOS, FakeRunner, FakeStep, generate

HASH_SEED = chain_seed(b"fake layout")
TENANT = "everybody"
"""Of all requests: they share blocks."""


def make_request(
    request_id: int,
    tokens: Sequence[int],
    *,
    block_size: int,
    choices: tuple[int, ...] = (0,),
    priority: int = 0,
    num_prompt_tokens: int | None = None,
    sampling: SamplingParams | None = None,
) -> Request:
    return Request(
        id=request_id,
        tokens=list(tokens),
        num_prompt_tokens=len(tokens) if num_prompt_tokens is None else num_prompt_tokens,
        sampling=sampling or SamplingParams(max_tokens=4, ignore_eos=True, seed=request_id),
        choices=choices,
        priority=priority,
        hash_seed=HASH_SEED,
        hashes=hash_blocks(tokens, block_size, HASH_SEED),
        tenant=TENANT,
    )


def check_tenants(pool: BlockPool) -> None:
    """However a block came here, it is known for whom."""
    for block in range(pool.num_blocks):
        assert pool.tenant_of(block) == (TENANT if pool.hash_of(block) is not None else ""), f"block {block}"


def expected(request: Request, choice: int, max_model_len: int) -> tuple[list[int], FinishReason]:
    """A choice's whole answer and why it ends, worked out the slow way."""
    sampling = request.sampling
    replayed = len(request.tokens) - request.num_prompt_tokens
    answer: list[int] = []
    for token in generate(request.tokens, sampling, choice, max(1, sampling.max_tokens)):
        answer.append(token)
        stops = token in sampling.stop_token_ids or (token == EOS and not sampling.ignore_eos)
        if stops and replayed + len(answer) > sampling.min_tokens:
            return answer, FinishReason.STOP
        if replayed + len(answer) >= sampling.max_tokens or len(request.tokens) + len(answer) >= max_model_len:
            return answer, FinishReason.LENGTH
    raise AssertionError("an answer has an end")


@dataclass(slots=True, eq=False)
class Flight:
    """A read in flight: (destination, entry of the table) for each of its blocks."""

    blocks: list[tuple[int, int]]

    @property
    def targets(self) -> list[int]:
        return [block for block, _ in self.blocks]


@dataclass(slots=True, eq=False)
class FakePull:
    request: Request
    num_told: int = 0
    flights: list[Flight] = field(default_factory=list)
    is_over: bool = False
    table: list[int] = field(default_factory=list)
    num_local: int = 0

    def in_flight(self) -> list[int]:
        return [block for flight in self.flights for block in flight.targets]


@dataclass(slots=True, eq=False)
class FakeSwap:
    """A fetch of blocks that were lost here, from a store that may not have them all."""

    id: int
    tokens: list[int]
    hashes: list[bytes]
    table: list[int]
    num_local: int
    num_told: int
    flights: list[Flight] = field(default_factory=list)
    is_over: bool = False


class DecodeWorld:
    """Drives a DecodeScheduler as the decode worker does, and holds every answer against the truth."""

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
        low_water: float = 0.0,
        swaps: bool = True,
    ) -> None:
        """`overlap`: a step is planned and launched before the one before it is finished."""
        self.overlap = overlap
        self.ahead: tuple[StepPlan, FakeStep] | None = None
        self.block_size = block_size
        self.budget = budget
        self.max_model_len = max_model_len or num_blocks * block_size
        self.pool = BlockPool(num_blocks, epoch=1, prefix_caching=prefix_caching)
        self.runner = FakeRunner(self.pool, block_size=block_size, max_num_seqs=max_num_seqs, window=window)
        self.offers = OfferPolicy(self.pool, low_water=low_water, span=Window(window, block_size).span)
        self.offered: list[list[bytes]] = []
        self.stored: set[bytes] = set()
        """What others can lend: what the store has taken, and prefixes of prompts. Nothing unless a test says so."""
        self.swap_cost = SwapCost(block_bytes=100, block_tokens=block_size)
        self.swaps: dict[int, FakeSwap] = {}
        self.num_swapped_in = 0
        self.scheduler = DecodeScheduler(
            self.pool,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            stop=StopRule(frozenset({EOS}), self.max_model_len),
            window=window,
            offers=self.offers,
            swap_cost=self.swap_cost if swaps else None,
        )
        self.pulls: dict[int, FakePull] = {}
        self.ghosts: list[FakePull] = []
        """Pulls whose request is gone or is computed here, with reads that still write."""
        self.late_swaps: list[FakeSwap] = []
        self.requests: dict[int, Request] = {}
        self.choices: dict[int, set[int]] = {}
        """Wanted ones that are not finished."""
        self.answers: dict[tuple[int, int], list[int]] = {}
        self.reasons: dict[tuple[int, int], FinishReason] = {}

    # -- what clients do ----------------------------------------------------------------------------------------------

    def request(self, tokens: Sequence[int], **options: object) -> Request:
        request_id = len(self.requests) + 1
        request = make_request(request_id, tokens, block_size=self.block_size, **options)  # type: ignore[arg-type]
        self.requests[request_id] = request
        return request

    def submit_local(self, request: Request, elsewhere: Sequence[range] = (), num_true: int = 1000) -> Request:
        """`elsewhere`: what others are said to hold; so many leading blocks they do."""
        self._accept(request)
        for piece in elsewhere:
            self.stored.update(request.hashes[piece.start : min(piece.stop, num_true)])
        self.scheduler.submit_local(request, elsewhere)
        return request

    def book(self, request: Request) -> bool:
        if not self.scheduler.book(request):
            return False
        self._accept(request)
        self.pulls[request.id] = FakePull(request)
        return True

    def _accept(self, request: Request) -> None:
        self.choices[request.id] = set(request.choices)
        for choice in request.choices:
            self.answers[request.id, choice] = []

    def cancel(self, request_id: int) -> None:
        pull = self.pulls.pop(request_id, None)
        self.scheduler.drop(request_id, (), pull.in_flight() if pull else ())
        self.choices[request_id].clear()
        self._end(pull)

    def cancel_choices(self, request_id: int, choices: Iterable[int]) -> None:
        dropped = tuple(choices)
        self.scheduler.drop(request_id, dropped)
        self.choices[request_id].difference_update(dropped)

    def _end(self, pull: FakePull | None) -> None:
        if pull is not None:
            pull.is_over = True
            self.ghosts.append(pull)

    # -- what owners and reads do -------------------------------------------------------------------------------------

    def want(self, request_id: int) -> None:
        self.scheduler.want_destination(request_id)

    def start_read(self, request_id: int, count: int) -> None:
        """The owner has told of `count` more blocks."""
        pull = self.pulls[request_id]
        if not pull.table:
            return
        told = range(pull.num_told, min(len(pull.table), pull.num_told + count))
        pull.num_told = max(pull.num_told, told.stop)
        blocks = [(pull.table[index], index) for index in told if index >= pull.num_local]
        if blocks:
            pull.flights.append(Flight(blocks))

    def land(self, pull: FakePull, at: int = 0) -> None:
        """A read ends well; it wrote until now."""
        flight = pull.flights.pop(at)
        for block, index in flight.blocks:
            assert self.pool.state(block) in (BlockState.LANDING, BlockState.QUARANTINED), f"block {block} was reused"
            self.runner.land(block, index, pull.request.tokens)
        if pull.is_over:
            self.scheduler.settle(flight.targets)
        else:
            self.scheduler.landed(pull.request.id, flight.targets)

    def fail(self, request_id: int, *, stalled: bool) -> None:
        """A read fails (writing rubbish to its end), or none of them moves any more: the prompt is computed here."""
        pull = self.pulls.pop(request_id)
        if pull.flights and not stalled:
            for block in pull.flights.pop().targets:
                self.runner.write(block, [-1] * self.block_size)
        in_flight = pull.in_flight()
        self.scheduler.recompute(request_id, in_flight)
        if in_flight:
            self.scheduler.quarantine(in_flight)
        self._end(pull)

    def join(self, request_id: int) -> bool:
        """False: not everything has landed yet."""
        pull = self.pulls[request_id]
        if not pull.table or pull.num_told < len(pull.table) or pull.flights:
            return False
        del self.pulls[request_id]
        if not self.choices[request_id]:
            self.scheduler.drop(request_id)
            return True
        self.take(self.scheduler.join(request_id, self.first_tokens(pull.request)))
        return True

    def first_tokens(self, request: Request) -> list[DrawnToken]:
        return [self._first(request, choice) for choice in range(max(request.choices, default=-1) + 1)]

    def _first(self, request: Request, choice: int) -> DrawnToken:
        answer, reason = expected(request, choice, self.max_model_len)
        return DrawnToken(choice, answer[0], None, reason if len(answer) == 1 else None)

    # -- what the store does -------------------------------------------------------------------------------------------

    def store_takes(self, count: int = 1000) -> None:
        """Of each chain that was offered, the first `count` blocks."""
        for chain in self.offered:
            self.stored.update(chain[:count])

    def read_swap(self, swap: FakeSwap, count: int) -> None:
        """A read of the next blocks, as far as the store has them."""
        start = swap.num_told
        while swap.num_told < min(start + count, len(swap.table)) and swap.hashes[swap.num_told] in self.stored:
            swap.num_told += 1
        if swap.num_told > start:
            swap.flights.append(Flight([(swap.table[index], index) for index in range(start, swap.num_told)]))

    def land_swap(self, swap: FakeSwap, at: int = 0) -> None:
        flight = swap.flights.pop(at)
        for block, index in flight.blocks:
            assert self.pool.state(block) in (BlockState.LANDING, BlockState.QUARANTINED), f"block {block} was reused"
            self.runner.land(block, index, swap.tokens)
        if swap.is_over:
            self.scheduler.settle(flight.targets)
        else:
            self.scheduler.swaps.landed(swap.id, flight.targets)
            self.num_swapped_in += len(flight.targets)

    def end_swap(self, swap: FakeSwap) -> None:
        """Time is up: what is still being read comes late."""
        del self.swaps[swap.id]
        swap.is_over = True
        self.late_swaps.append(swap)
        in_flight = [block for flight in swap.flights for block in flight.targets]
        self.scheduler.end_swap(swap.id, in_flight)
        if in_flight:
            self.scheduler.quarantine(in_flight)

    def _finish_swaps(self) -> None:
        for swap in list(self.swaps.values()):
            self.read_swap(swap, len(swap.table))
            while swap.flights:
                self.land_swap(swap)
            self.end_swap(swap)

    # -- steps --------------------------------------------------------------------------------------------------------

    def step(self) -> StepPlan:
        """One turn of the engine's thread; the plan that it finished."""
        plan, step = self.ahead or self._launch()
        if self.overlap and plan.changes_anything:
            ahead = self._launch()
            self.ahead = ahead if ahead[0].changes_anything else None
        else:
            self.ahead = None
        if plan.changes_anything:
            self.take(self.scheduler.finish(plan, step.wait()))
        check_tenants(self.pool)
        for offer in self.offers.due():
            assert offer.tenant == TENANT
            chain = list(offer.hashes)
            assert len(self.pool.find_prefix(chain)) == len(chain) > 0, "offered what is not there"
            self.offered.append(chain)
        for fetch in self.scheduler.swaps.drain_granted():
            request, told = fetch.request, fetch.num_local
            table = fetch.blocks[: fetch.end]
            self.swaps[request.id] = FakeSwap(request.id, list(request.tokens), list(request.hashes), table, told, told)
        for arrival in self.scheduler.grant():
            assert len(arrival.blocks) == blocks_for(len(arrival.request.tokens), self.block_size)
            pull = self.pulls[arrival.request.id]
            assert not pull.table, "granted twice"
            pull.table, pull.num_local = list(arrival.blocks), arrival.num_local
        if plan.is_empty and self.ahead is None:
            self._check_may_sleep()
        return plan

    def _launch(self) -> tuple[StepPlan, FakeStep]:
        plan = self.scheduler.schedule()
        assert plan.num_tokens <= max(self.budget, len(plan.decode)), f"over budget: {plan}"
        # What changes nothing is not launched.
        return plan, self.runner.launch(plan) if plan.changes_anything else FakeStep(self.runner, plan, plan)

    def _check_may_sleep(self) -> None:
        """The engine's thread waits for a command now: there must be nothing that it could do without one."""
        again = self.scheduler.schedule()
        assert not again.changes_anything, f"slept on {again}"
        assert not self.scheduler.grant(), "slept on a grant"
        assert not self.scheduler.swaps.drain_granted(), "slept on a swap"

    def take(self, step: DecodeStep) -> None:
        columns = step.tokens
        reasons = {finish.key: finish.reason for finish in step.finished}
        assert not step.bad
        for *key, position, token in zip(
            columns.handles, columns.choices, columns.positions, columns.token_ids, strict=True
        ):
            request_id, choice = key
            assert choice in self.choices[request_id], f"{key} drew though it is over"
            answer = self.answers[request_id, choice]
            assert position == len(self.requests[request_id].tokens) + len(answer), f"{key}: out of order"
            answer.append(token)
            if (reason := reasons.pop(SequenceKey(request_id, choice), None)) is not None:
                self.reasons[request_id, choice] = reason
                self.choices[request_id].discard(choice)
        assert not reasons, f"they ended without a token: {reasons}"

    def run_to_end(self, limit: int = 2000) -> None:
        """Everything lands and nobody cancels any more: each request must end."""
        for turn in range(limit):
            if not any(self.choices.values()) and not self.pulls:
                break
            if turn > 5:
                self._land_ghosts()
            for request_id, pull in list(self.pulls.items()):
                self.want(request_id)
                self.start_read(request_id, len(pull.table))
                while pull.flights:
                    self.land(pull)
                self.join(request_id)
            self._finish_swaps()
            self.step()
        assert not any(self.choices.values()), f"unfinished: {self.choices}; {self.pool.ledger()}"
        self._land_ghosts()
        self.settle()

    def settle(self) -> None:
        """Turns until the engine's thread would sleep."""
        self._finish_swaps()
        while not self.step().is_empty or self.ahead is not None:
            pass

    def _land_ghosts(self) -> None:
        for pull in self.ghosts:
            while pull.flights:
                self.land(pull)
        for swap in self.late_swaps:
            while swap.flights:
                self.land_swap(swap)

    def check(self) -> None:
        self.pool.check_integrity()

    def check_answers(self) -> None:
        """Of all who were not cancelled; those who were have got a beginning of theirs."""
        for (request_id, choice), answer in self.answers.items():
            truth, reason = expected(self.requests[request_id], choice, self.max_model_len)
            if (request_id, choice) in self.reasons:
                assert (answer, self.reasons[request_id, choice]) == (truth, reason)
            else:
                assert answer == truth[: len(answer)]

    def check_empty(self) -> None:
        ledger = self.pool.ledger()
        assert ledger.free + ledger.cached == ledger.total, f"leaked: {self.pool!r}"
        assert (self.scheduler.num_waiting, self.scheduler.num_running) == (0, 0)
        assert self.runner.rows.count(None) == len(self.runner.rows)

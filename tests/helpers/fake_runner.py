"""A runner without a model. Every place of its KV holds a digest of all tokens up to there, so that reading another's
block, a block that was never written or one written too late fails at the step that reads it."""

import copy
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tailrace.kv.block_pool import BlockPool, BlockState
from tailrace.plan import Chunk, SequenceStart, StepOutput, StepPlan
from tailrace.types import SamplingParams, TokenLogprob

VOCAB = 23
EOS = 0


def digests(tokens: Iterable[int]) -> list[int]:
    """Of each prefix of `tokens`; hashes of integers are the same in every process."""
    found: list[int] = []
    last = 7
    for token in tokens:
        last = hash((last, token))
        found.append(last)
    return found


def draw(sampling: SamplingParams, choice: int, position: int, digest: int) -> int:
    """The token at `position`, by everything that may decide it and nothing else."""
    return hash((sampling.seed, choice, position, digest)) % VOCAB


def generate(tokens: Sequence[int], sampling: SamplingParams, choice: int, count: int) -> list[int]:
    """The next `count` tokens, without any cache."""
    known = list(tokens)
    for _ in range(count):
        known.append(draw(sampling, choice, len(known), digests(known)[-1]))
    return known[len(tokens) :]


@dataclass(slots=True)
class Row:
    """What the runner remembers of a slot."""

    tokens: list[int]
    sampling: SamplingParams
    choice: int
    blocks: list[int]


@dataclass(slots=True, eq=False)
class FakeStep:
    runner: "FakeRunner"
    plan: StepPlan
    as_launched: StepPlan
    output: StepOutput | None = None

    def wait(self) -> StepOutput:
        self.runner.compute_until(self)
        assert self.output is not None
        return self.output


class FakeRunner:
    """Holds a plan to its contract: rows begin and end, tables grow at their end, nobody writes what others read."""

    def __init__(
        self, pool: BlockPool, *, block_size: int, max_num_seqs: int, with_logprobs: bool = False, window: int = 0
    ) -> None:
        """`window`: tokens that each one reads, itself included; 0: all before it."""
        self._window = window
        self._pool = pool
        self._block_size = block_size
        self._with_logprobs = with_logprobs
        self.rows: list[Row | None] = [None] * max_num_seqs
        self.places: list[int | None] = [None] * (pool.num_blocks * block_size)
        self.plans: list[StepPlan] = []
        self._launched: deque[FakeStep] = deque()
        self.bad: set[tuple[int, int]] = set()
        """(choice, position) of which nothing can be drawn."""

    # -- the runner's contract ----------------------------------------------------------------------------------------

    def launch(self, plan: StepPlan) -> "FakeStep":
        """Computed as late as it may be: when somebody waits for it."""
        self.plans.append(plan)
        step = FakeStep(self, plan, copy.deepcopy(plan))
        self._launched.append(step)
        return step

    def run(self, plan: StepPlan) -> StepOutput:
        return self.launch(plan).wait()

    def compute_until(self, step: "FakeStep") -> None:
        while step.output is None:
            first = self._launched.popleft()
            assert first.plan == first.as_launched, "a plan changed after its launch"
            first.output = self._compute_plan(first.plan)

    def _compute_plan(self, plan: StepPlan) -> StepOutput:
        self._apply(plan)
        out = StepOutput(elapsed_s=0.001, logprobs=[] if self._with_logprobs else None)
        written: set[int] = set()
        for slot in plan.decode:
            row = self._row(slot)
            self._compute(row, len(row.tokens) - 1, len(row.tokens), written)
            self._draw(slot, row, (row.choice,), out)
        for chunk in plan.chunks:
            self._run_chunk(chunk, written, out)
        return out

    def _apply(self, plan: StepPlan) -> None:
        for slot in plan.released:
            assert self.rows[slot] is not None, f"slot {slot} is released twice"
            self.rows[slot] = None
        for start in plan.started:
            self._start(start)
        for append in plan.appended:
            row = self._row(append.slot)
            assert append.index == len(row.blocks), f"slot {append.slot}: a table grows at its end"
            row.blocks.extend(append.blocks)
        for block_copy in plan.copies:
            assert self._pool.state(block_copy.source) is BlockState.ACTIVE, f"copy from nobody's block: {block_copy}"
            assert self._pool.state(block_copy.target) is BlockState.ACTIVE, f"copy into nobody's block: {block_copy}"
            self.write(block_copy.target, self.read(block_copy.source))

    def _start(self, start: SequenceStart) -> None:
        assert self.rows[start.slot] is None, f"slot {start.slot} is taken"
        self.rows[start.slot] = Row(list(start.tokens), start.sampling, start.choice, list(start.blocks))

    def _run_chunk(self, chunk: Chunk, written: set[int], out: StepOutput) -> None:
        row = self._row(chunk.slot)
        assert chunk.start < chunk.end <= len(row.tokens), f"an empty or overlong chunk: {chunk}"
        self._compute(row, chunk.start, chunk.end, written)
        if chunk.choices:
            assert chunk.end == len(row.tokens), f"drawn before the end: {chunk}"
            self._draw(chunk.slot, row, chunk.choices, out)

    def _row(self, slot: int) -> Row:
        row = self.rows[slot]
        assert row is not None, f"slot {slot} is empty"
        return row

    def _compute(self, row: Row, start: int, end: int, written: set[int]) -> None:
        truth = digests(row.tokens[:end])
        for position in range(max(0, start - self._window + 1) if self._window else 0, start):
            place = self._place(row, position)
            assert self._pool.state(place // self._block_size) is BlockState.ACTIVE, f"{position} of {row} is not held"
            assert self.places[place] == truth[position], f"position {position} of {row} is not what was computed"
        for position in range(start, end):
            self.places[self._place(row, position)] = truth[position]
        blocks = set(row.blocks[start // self._block_size : (end - 1) // self._block_size + 1])
        assert not blocks & written, f"two rows write {blocks & written} in one step"
        written |= blocks
        for block in blocks:
            assert self._pool.state(block) is BlockState.ACTIVE, f"block {block} is written but not held"
            assert self._pool.hash_of(block) is None, f"block {block} is written though others can find it"
            assert self._pool.num_lends(block) == 0, f"block {block} is written though it is lent"

    def _place(self, row: Row, position: int) -> int:
        return row.blocks[position // self._block_size] * self._block_size + position % self._block_size

    def _draw(self, slot: int, row: Row, choices: Sequence[int], out: StepOutput) -> None:
        position = len(row.tokens)
        digest = digests(row.tokens)[-1]
        for choice in choices:
            token = draw(row.sampling, choice, position, digest)
            if (choice, position) in self.bad:
                token, out.bad_rows = 0, (*out.bad_rows, len(out.tokens))
            out.slots.append(slot)
            out.choices.append(choice)
            out.positions.append(position)
            out.tokens.append(token)
            if out.logprobs is not None:
                out.logprobs.append(TokenLogprob(-float(token)))
            if choice == row.choice:
                row.tokens.append(token)

    # -- what reads from elsewhere do ---------------------------------------------------------------------------------

    def read(self, block: int) -> list[int | None]:
        return self.places[block * self._block_size : (block + 1) * self._block_size]

    def write(self, block: int, values: Sequence[int | None]) -> None:
        padded = [*values, *[None] * (self._block_size - len(values))]
        self.places[block * self._block_size : (block + 1) * self._block_size] = padded

    def land(self, block: int, index: int, tokens: Sequence[int]) -> None:
        """A read brings block `index` of the prompt `tokens`."""
        self.write(block, digests(tokens)[index * self._block_size : (index + 1) * self._block_size])

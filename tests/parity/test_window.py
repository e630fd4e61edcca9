"""A model whose layers all have a window, served from few blocks: its tokens are those of transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tailrace.engine.engine import Engine
from tailrace.kv.block_pool import BlockPool, BlockState
from tailrace.kv.hashing import chain_seed, hash_blocks
from tailrace.kv.window import Window
from tailrace.plan import StepOutput, StepPlan
from tailrace.policy.decode_scheduler import DecodeScheduler
from tailrace.policy.request import Request, StopRule
from tailrace.types import SamplingParams
from tests.helpers.reference_models import engine_on
from tests.helpers.teacher_forcing import Reference
from tests.helpers.tiny_model import TinySize, make_tiny_model
from tests.helpers.traffic import prompt_of

pytestmark = pytest.mark.parity

WINDOW = 48
LONGEST = 1024
LEAST = Window(WINDOW, 16).least_held(LONGEST)
"""Blocks: 5, of 80 tokens."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=240, ignore_eos=True)
PROMPTS = [prompt_of(length, length) for length in (5, 300, 47, 160, 333, 64)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("windowed"), TinySize(window=WINDOW))


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model, torch.float32)


@pytest.fixture(params=[True, False], ids=["native", "torch"])
def native(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


class Server:
    """The decode worker's scheduler over an engine. What nobody holds or can find is overwritten before each step."""

    def __init__(self, engine: Engine, rubbish: float, *, caching: bool, chunk: int = 40) -> None:
        self.engine, self.rubbish = engine, rubbish
        layout = engine.layout
        self.pool = BlockPool(engine.cache.num_blocks, epoch=1, prefix_caching=caching)
        self.seed = chain_seed(layout.fingerprint, "", "")
        self.scheduler = DecodeScheduler(
            self.pool,
            block_size=layout.block_size,
            max_num_seqs=8,
            max_num_batched_tokens=chunk,
            stop=StopRule(frozenset({2}), engine.max_model_len),
            window=layout.window,
        )
        self.most_active = 0
        self.first_computed: dict[int, int] = {}

    def generate(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts]
        for number, tokens in enumerate(prompts):
            hashes = hash_blocks(tokens, self.engine.layout.block_size, self.seed)
            request = Request(number, list(tokens), len(tokens), GREEDY, (0,), 0, self.seed, hashes)
            self.scheduler.submit_local(request)
        num_open = len(prompts)
        while num_open:
            plan = self.scheduler.schedule()
            for request_id, chunk in zip(self.scheduler.prefilling() if plan.chunks else (), plan.chunks, strict=True):
                self.first_computed.setdefault(request_id, chunk.start)
            step = self.scheduler.finish(plan, self._run(plan))
            for handle, token in zip(step.tokens.handles, step.tokens.token_ids, strict=True):
                answers[handle].append(token)
            num_open -= len(step.finished)
        return answers

    def _run(self, plan: StepPlan) -> StepOutput:
        self.most_active = max(self.most_active, self.pool.ledger().active)
        blocks = range(self.pool.num_blocks)
        self.engine.cache.tensor[[block for block in blocks if self.pool.state(block) is BlockState.FREE]] = (
            self.rubbish
        )
        return self.engine.runner.run(plan)


def server(model: Path, native: bool, num_blocks: int = LEAST, **options: Any) -> Server:
    engine = engine_on(model, native=native, num_blocks=num_blocks, max_model_len=LONGEST, block_size=16)
    assert engine.layout.window == WINDOW
    # Plain torch multiplies what it masks in a block, so what is there must be finite.
    return Server(engine, torch.nan if native else 100.0, **options)


def check(reference: Reference, prompt: list[int], answer: list[int]) -> None:
    comparison = reference.compare("", prompt, answer)
    assert len(answer) == GREEDY.max_tokens
    assert list(comparison.actual) == list(comparison.expected)


@pytest.mark.parametrize("caching", [False, True])
def test_longer_than_the_pool_alone(model: Path, reference: Reference, native: bool, caching: bool) -> None:
    alone = server(model, native, caching=caching)
    for prompt in PROMPTS[:2]:
        [answer] = alone.generate([prompt])
        check(reference, prompt, answer)
    assert alone.most_active <= LEAST < len(PROMPTS[1] + answer) // 16
    assert alone.scheduler.num_preempted == 0


@pytest.mark.parametrize("num_blocks", [LEAST, 20, 100])
def test_in_a_batch(model: Path, reference: Reference, native: bool, num_blocks: int) -> None:
    """In the smallest pool they take turns, in the next one they give way to one another."""
    batch = server(model, native, num_blocks, caching=False)
    for prompt, answer in zip(PROMPTS, batch.generate(PROMPTS), strict=True):
        check(reference, prompt, answer)


def test_after_a_cached_prefix(model: Path, reference: Reference, native: bool) -> None:
    both = server(model, native, 64, caching=True)
    first = PROMPTS[4]
    [answer] = both.generate([first])
    # The second turn of a conversation. Its first turn's last token is not computed.
    second = [*first, *answer, *PROMPTS[0]]
    both.first_computed.clear()
    [again] = both.generate([second])
    check(reference, second, again)
    assert both.first_computed[0] == (len(first) + len(answer) - 1) // 16 * 16

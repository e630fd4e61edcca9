"""What the runner does with a plan: rows by difference, positions, own and other choices, copies, reuse of slots."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tailrace.engine.engine import Engine, EngineOptions, load_engine
from tailrace.plan import BlockAppend, BlockCopy, Chunk, SequenceStart, StepOutput, StepPlan
from tailrace.types import SamplingParams
from tests.helpers.model_files import MISTRAL_CONFIG

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
PROMPT = list(range(10, 31))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps({**MISTRAL_CONFIG, "sliding_window": None}))
    return path


@pytest.fixture
def engine(directory: Path) -> Engine:
    return load_engine(
        EngineOptions(directory, dtype="float32", block_size=4, num_blocks=70, load_format="dummy", max_num_seqs=4)
    )


def begin(
    slot: int,
    blocks: Sequence[int],
    *,
    tokens: Sequence[int] = PROMPT,
    choice: int = 0,
    sampling: SamplingParams = GREEDY,
) -> SequenceStart:
    return SequenceStart(slot, list(tokens), len(tokens), sampling, choice, list(blocks))


def columns(output: StepOutput) -> list[tuple[int, int, int]]:
    return list(zip(output.slots, output.choices, output.positions, strict=True))


def alone(engine: Engine, count: int, *, prompt: Sequence[int] = PROMPT) -> list[int]:
    """`count` greedy tokens after `prompt`, in slot 3 and the last blocks."""
    started = [begin(3, range(50, 70), tokens=prompt)]
    tokens = engine.runner.run(StepPlan(started=started, chunks=[Chunk(3, 0, len(prompt), (0,))])).tokens
    for _ in range(count - 1):
        tokens += engine.runner.run(StepPlan(decode=[3])).tokens
    engine.runner.run(StepPlan(released=[3]))
    return tokens


def test_a_prompt_and_its_continuation(engine: Engine) -> None:
    expected = alone(engine, 5)
    first = engine.runner.run(StepPlan(started=[begin(1, range(6))], chunks=[Chunk(1, 0, 21, (0,))]))
    assert (columns(first), first.tokens) == ([(1, 0, 21)], expected[:1])
    assert first.logprobs is None
    assert first.elapsed_s > 0
    for index in range(1, 5):
        blocks = [BlockAppend(1, 6, [9])] if index == 4 else []
        output = engine.runner.run(StepPlan(decode=[1], appended=blocks))
        assert (columns(output), output.tokens) == ([(1, 0, 21 + index)], expected[index : index + 1])
    assert engine.runner.batch.tokens[1, :26].tolist() == PROMPT + expected
    assert engine.runner.batch.lengths.tolist() == [0, 26, 0, 21 + 5]


def test_an_empty_plan_computes_nothing_but_is_applied(engine: Engine) -> None:
    output = engine.runner.run(StepPlan(started=[begin(0, [1, 2])]))
    assert (output.slots, output.tokens) == ([], [])
    assert engine.runner.batch.tokens[0, :21].tolist() == PROMPT
    assert engine.runner.run(StepPlan()).tokens == []


def test_a_chunk_in_the_middle_draws_nothing(engine: Engine) -> None:
    output = engine.runner.run(StepPlan(started=[begin(0, range(6))], chunks=[Chunk(0, 0, 13)]))
    assert output.tokens == []
    rest = engine.runner.run(StepPlan(chunks=[Chunk(0, 13, 21, (0,))]))
    assert rest.tokens == alone(engine, 1)


def test_decode_rows_come_before_chunks(engine: Engine) -> None:
    engine.runner.run(StepPlan(started=[begin(2, range(6))], chunks=[Chunk(2, 0, 21, (0,))]))
    plan = StepPlan(started=[begin(0, range(10, 16))], chunks=[Chunk(0, 0, 21, (0,))], decode=[2])
    output = engine.runner.run(plan)
    assert columns(output) == [(2, 0, 22), (0, 0, 21)]
    expected = alone(engine, 2)
    assert output.tokens == [expected[1], expected[0]]


def test_other_choices_are_reported_and_not_appended(engine: Engine) -> None:
    sampling = SamplingParams(temperature=5.0, seed=3)
    started = [begin(0, range(6), choice=1, sampling=sampling)]
    output = engine.runner.run(StepPlan(started=started, chunks=[Chunk(0, 0, 21, (0, 1, 2))]))
    assert columns(output) == [(0, 0, 21), (0, 1, 21), (0, 2, 21)]
    assert len(set(output.tokens)) > 1
    assert engine.runner.batch.tokens[0, :22].tolist() == [*PROMPT, output.tokens[1]]
    assert engine.runner.batch.lengths[0] == 22


def test_a_chunk_may_draw_for_others_alone(engine: Engine) -> None:
    output = engine.runner.run(StepPlan(started=[begin(0, range(6))], chunks=[Chunk(0, 0, 21, (3,))]))
    assert columns(output) == [(0, 3, 21)]
    assert engine.runner.batch.lengths[0] == 21


def test_a_fork_copies_the_partial_block(engine: Engine) -> None:
    """Two choices share full blocks; each writes into its own last one."""
    expected = alone(engine, 4)
    engine.runner.run(StepPlan(started=[begin(0, range(6))], chunks=[Chunk(0, 0, 21, (0,))]))
    forked = begin(1, [0, 1, 2, 3, 4, 40], tokens=[*PROMPT, 77], choice=1)
    first = engine.runner.run(StepPlan(started=[forked], copies=[BlockCopy(5, 40)], decode=[0, 1]))
    second = engine.runner.run(StepPlan(decode=[0, 1]))
    assert [first.tokens[0], second.tokens[0]] == expected[1:3]
    assert [first.tokens[1], second.tokens[1]] == alone(engine, 2, prompt=[*PROMPT, 77])
    assert columns(second) == [(0, 0, 23), (1, 1, 23)]


def test_a_slot_is_reused_after_another_sequence(engine: Engine) -> None:
    engine.runner.run(StepPlan(started=[begin(0, range(6))], chunks=[Chunk(0, 0, 21, (0,))]))
    short = list(range(40, 47))
    plan = StepPlan(released=[0], started=[begin(0, [8, 9], tokens=short)], chunks=[Chunk(0, 0, 7, (0,))])
    assert engine.runner.run(plan).tokens == alone(engine, 1, prompt=short)
    assert engine.runner.batch.lengths[0] == 8


def test_a_preempted_sequence_is_recomputed(engine: Engine) -> None:
    expected = alone(engine, 6)
    known = [*PROMPT, *expected[:3]]
    started = SequenceStart(0, known, len(PROMPT), GREEDY, 0, list(range(20, 28)))
    tokens = engine.runner.run(StepPlan(started=[started], chunks=[Chunk(0, 0, 24, (0,))])).tokens
    tokens += engine.runner.run(StepPlan(decode=[0])).tokens
    assert tokens == expected[3:5]


def test_logprobs_come_in_the_order_of_draws(engine: Engine) -> None:
    asks = SamplingParams(temperature=0.0, logprobs=2)
    started = [begin(0, range(6)), begin(1, range(6, 12), sampling=asks)]
    output = engine.runner.run(StepPlan(started=started, chunks=[Chunk(0, 0, 21, (0,)), Chunk(1, 0, 21, (0,))]))
    assert output.logprobs is not None
    assert output.logprobs[0] is None
    assert output.logprobs[1] is not None
    assert output.logprobs[1].top[0][0] == output.tokens[1]
    assert len(output.logprobs[1].top) == 2


def test_plans_that_make_no_sense_are_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="257 tokens, a row holds 1 to 256"):
        engine.runner.run(StepPlan(started=[begin(0, [], tokens=[5] * 257)]))
    with pytest.raises(ValueError, match="table entries 63 to 65 of 64"):
        engine.runner.run(StepPlan(appended=[BlockAppend(0, 63, [1, 2])]))
    engine.runner.run(StepPlan(started=[begin(0, range(6))]))
    with pytest.raises(ValueError, match="draws after token 9 of 21"):
        engine.runner.run(StepPlan(chunks=[Chunk(0, 0, 9, (0,))]))


def test_hidden_states_of_all_tokens_are_at_hand(engine: Engine) -> None:
    step = engine.runner.forward(StepPlan(started=[begin(0, range(6))], chunks=[Chunk(0, 0, 21, (0,))]))
    assert step is not None
    with torch.inference_mode():
        assert torch.equal(engine.runner.model.logits(step.hidden[-1:]), step.logits)
    assert step.hidden.shape == (21, 32)

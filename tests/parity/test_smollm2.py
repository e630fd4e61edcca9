"""The real model: greedy texts against transformers, token by token."""

from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from tailrace.checkpoint.resolve import resolve_model
from tailrace.cli.bench.corpus import PROMPTS
from tailrace.plan import BlockAppend, Chunk, StepPlan
from tailrace.types import SamplingParams
from tests.helpers.neartie import TOP_COUNT, Comparison, Top, assert_equal_but_for_near_ties, first_difference
from tests.helpers.reference_models import GREEDY, engine_on, start

pytestmark = [pytest.mark.parity, pytest.mark.timeout(600)]

NUM_TOKENS = 64
BLOCKS_EACH = 12
BLOCK_SIZE = 16


@pytest.fixture(scope="module")
def directory() -> Path:
    return resolve_model("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def prompts(directory: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return [tokenizer.encode(prompt).ids for prompt in PROMPTS]


def generate(
    directory: Path, prompts: list[list[int]], dtype: str, sampling: SamplingParams = GREEDY
) -> list[list[int]]:
    """All prompts at once, joining one a step while the others already decode; blocks are added as they are needed."""
    num_blocks = BLOCKS_EACH * max(len(prompts), 6)
    sizes = {"max_num_seqs": len(prompts), "max_model_len": 1024, "block_size": BLOCK_SIZE, "num_blocks": num_blocks}
    engine = engine_on(directory, dtype=dtype, **sizes)
    texts: list[list[int]] = [[] for _ in prompts]
    waiting = list(enumerate(prompts))
    while waiting or min(map(len, texts)) < NUM_TOKENS:
        decode = [slot for slot, text in enumerate(texts) if 0 < len(text) < NUM_TOKENS]
        joining = [waiting.pop(0)] if waiting else []
        plan = StepPlan(
            started=[start(slot, tokens, _blocks(slot, 0, len(tokens)), sampling=sampling) for slot, tokens in joining],
            appended=[_next_block(slot, len(prompts[slot]) + len(texts[slot])) for slot in decode],
            chunks=[Chunk(slot, 0, len(tokens), (0,)) for slot, tokens in joining],
            decode=decode,
        )
        output = engine.runner.run(plan)
        for slot, token in zip(output.slots, output.tokens, strict=True):
            texts[slot].append(token)
    return texts


def _blocks(slot: int, first: int, num_tokens: int) -> list[int]:
    return [BLOCKS_EACH * slot + index for index in range(first, -(-num_tokens // BLOCK_SIZE))]


def _next_block(slot: int, num_tokens: int) -> BlockAppend:
    """Entry of the table that token `num_tokens - 1` lies in; saying again what is there already changes nothing."""
    index = (num_tokens - 1) // BLOCK_SIZE
    return BlockAppend(slot, index, _blocks(slot, index, num_tokens))


def compare(directory: Path, prompts: list[list[int]], texts: list[list[int]], dtype: torch.dtype) -> list[Comparison]:
    """Each text against what transformers finds most likely after each of its prefixes.

    Up to the first difference that is the reference's own greedy text, by induction, for one pass a prompt.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    return [_comparison(model, name, tokens, text) for name, tokens, text in zip(PROMPTS, prompts, texts, strict=True)]


@torch.inference_mode()
def _comparison(model: torch.nn.Module, name: str, tokens: list[int], text: list[int]) -> Comparison:
    logits = model(torch.tensor([tokens + text[:-1]])).logits[0, len(tokens) - 1 :].float()
    best = logits.log_softmax(-1).topk(TOP_COUNT)
    expected = best.indices[:, 0].tolist()

    def top(index: int) -> Top:
        return list(zip(best.indices[index].tolist(), best.values[index].tolist(), strict=True))

    index = first_difference(text, expected)
    if index is not None:  # what follows is another text
        text, expected = text[: index + 1], expected[: index + 1]
    return Comparison(name[:30], text, expected, top)


@pytest.fixture(scope="module")
def greedy(directory: Path, prompts: list[list[int]]) -> list[list[int]]:
    return generate(directory, prompts, "float32")


def test_float32_is_equal_token_by_token(directory: Path, prompts: list[list[int]], greedy: list[list[int]]) -> None:
    for comparison in compare(directory, prompts, greedy, torch.float32):
        assert list(comparison.actual) == list(comparison.expected), comparison.label
        assert len(comparison.actual) == NUM_TOKENS


def test_float32_equals_transformers_own_generation(directory: Path, prompts: list[list[int]]) -> None:
    """Grounds the induction above: the reference's own loop, with its own cache."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    chosen = prompts[1:3]
    for tokens, text in zip(chosen, generate(directory, chosen, "float32"), strict=True):
        given = torch.tensor([tokens])
        options = {"do_sample": False, "min_new_tokens": NUM_TOKENS, "max_new_tokens": NUM_TOKENS}
        out = model.generate(given, attention_mask=torch.ones_like(given), eos_token_id=None, **options)
        assert out[0, len(tokens) :].tolist() == text


def test_one_seed_is_one_text_alone_and_in_a_batch(
    directory: Path, prompts: list[list[int]], greedy: list[list[int]]
) -> None:
    """In float32; each row also draws with the others' seed, which must not matter."""
    sampling = SamplingParams(temperature=0.8, seed=1234, ignore_eos=True)
    together = generate(directory, prompts[:16], "float32", sampling)
    assert together != greedy[:16]
    for index in (0, 9):
        assert generate(directory, [prompts[index]], "float32", sampling) == [together[index]]


def test_bfloat16_differs_in_near_ties_only(directory: Path, prompts: list[list[int]]) -> None:
    """Against float32, which does not tie; transformers' own bfloat16 agrees with itself less often than that."""
    texts = generate(directory, prompts, "bfloat16")
    assert_equal_but_for_near_ties(compare(directory, prompts, texts, torch.float32), min_equal=10)
    assert_equal_but_for_near_ties(compare(directory, prompts, texts, torch.bfloat16), min_equal=0)

"""The real model: its tokens are the same over either transport, without any, in one process, and in transformers."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Tokenizer

from tailrace.cli.bench.corpus import PROMPTS
from tailrace.client import AsyncClient, Completion
from tailrace.types import SamplingParams
from tests.helpers.cluster import MODEL, Cluster
from tests.helpers.neartie import assert_equal_but_for_near_ties
from tests.helpers.one_process import OneProcess
from tests.helpers.teacher_forcing import Reference

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

NUM_TOKENS = 64
GREEDY = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
SEEDED = {**GREEDY, "temperature": 0.8, "seed": 20_240_607, "max_tokens": 32}
BATCH = 16
TRANSPORTS = {"nixl": "nixl", "stream-overlapped": "stream", "colocated": ""}


class Arm(NamedTuple):
    cluster: Cluster
    transport: str


@pytest.fixture(scope="module")
def prompts(smollm2: Path) -> list[list[int]]:
    """Each long enough to be prefilled elsewhere, and different from the others in its first block."""
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    head = "Number {} of twenty beginnings of texts, collected from different sources, is this one:\n\n{}"
    prompts = [tokenizer.encode(head.format(number, text)).ids for number, text in enumerate(PROMPTS)]
    assert min(map(len, prompts)) > 17
    return prompts


@pytest.fixture(scope="module")
def one_process(smollm2: Path) -> OneProcess:
    return OneProcess(smollm2, dtype="float32")


@pytest.fixture(scope="module")
def greedy(one_process: OneProcess, prompts: list[list[int]]) -> list[list[int]]:
    return one_process.generate(prompts, SamplingParams(**GREEDY))


@pytest.fixture(scope="module")
def seeded(one_process: OneProcess, prompts: list[list[int]]) -> list[list[int]]:
    return one_process.generate(prompts[:BATCH], SamplingParams(**SEEDED))


def start(model: Path, name: str, dtype: str, **options: Any) -> Cluster:
    transport = TRANSPORTS[name] or "auto"
    overlap = "on" if name == "stream-overlapped" else "off"
    sizes = {"num_blocks": 512, "max_model_len": 2048, "max_num_batched_tokens": 512, "overlap_scheduling": overlap}
    return Cluster(model, dtype=dtype, transport=transport, **sizes, **options)


@pytest.fixture(scope="module", params=list(TRANSPORTS))
def arm(request: pytest.FixtureRequest, smollm2: Path) -> Iterator[Arm]:
    with start(smollm2, request.param, "float32") as cluster:
        transport = TRANSPORTS[request.param]
        yield Arm(cluster.start_workers(prefill=1 if transport else 0), transport)


@asynccontextmanager
async def client_of(cluster: Cluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(f"127.0.0.1:{cluster.grpc_port}") as client:
        yield client


async def generate(arm: Arm, prompts: Sequence[Sequence[int]], options: dict[str, Any], salt: str) -> list[list[int]]:
    """All at once. The salt keeps one test's prefixes from the next one, which wants them moved as well."""
    async with client_of(arm.cluster) as client:
        asked = (client.complete(p, model=MODEL, cache_salt=salt, **options) for p in prompts)
        answers: list[Completion] = await asyncio.gather(*asked)
    moved = [answer for answer in answers if answer.usage.transfer_bytes > 0]
    # A prompt of a few tokens may be computed where it is decoded.
    assert len(moved) > len(answers) // 2 if arm.transport else not moved
    assert {answer.usage.transport for answer in moved} <= {arm.transport}
    assert all(answer.usage.completion_tokens == options["max_tokens"] for answer in answers)
    return [list(answer.token_ids) for answer in answers]


async def test_greedy_tokens_are_those_of_one_process(
    arm: Arm, prompts: list[list[int]], greedy: list[list[int]]
) -> None:
    assert await generate(arm, prompts, GREEDY, "greedy") == greedy


async def test_a_seed_gives_one_text_alone_and_in_a_batch(
    arm: Arm, prompts: list[list[int]], seeded: list[list[int]]
) -> None:
    assert await generate(arm, prompts[:BATCH], SEEDED, "together") == seeded
    for index in (3, 15):
        assert await generate(arm, [prompts[index]], SEEDED, "alone") == [seeded[index]]


async def test_int8_tokens_are_those_of_one_process(smollm2: Path, prompts: list[list[int]]) -> None:
    """All at once, in whatever batches they meet: with one thread no row's bits depend on its neighbours."""
    alone = OneProcess(smollm2, dtype="bfloat16", quantization="int8")
    options = {**GREEDY, "max_tokens": 32}
    expected = [alone.generate([prompt], SamplingParams(**options))[0] for prompt in prompts[:BATCH]]
    with start(smollm2, "nixl", "bfloat16", quantization="int8", threads=1) as cluster:
        arm = Arm(cluster.start_workers(), "nixl")
        assert await generate(arm, prompts[:BATCH], options, "") == expected
        [model] = cluster.get("/v1/models").json()["data"]
        assert (model["dtype"], model["quantization"]) == ("bfloat16", "int8")
        for process in cluster.processes.values():
            assert "bfloat16, int8 weights" in process.said()


def test_greedy_tokens_are_those_of_transformers(
    smollm2: Path, prompts: list[list[int]], greedy: list[list[int]]
) -> None:
    reference = Reference(smollm2, torch.float32)
    for name, prompt, text in zip(PROMPTS, prompts, greedy, strict=True):
        comparison = reference.compare(name[:30], prompt, text)
        assert list(comparison.actual) == list(comparison.expected), name[:30]
        assert len(comparison.actual) == NUM_TOKENS


@pytest.mark.parity
async def test_bfloat16_differs_from_one_process_in_near_ties_only(smollm2: Path, prompts: list[list[int]]) -> None:
    """One after the other, because the shape of a batch flips near-ties, and requests meet in batches by chance."""
    alone = OneProcess(smollm2, dtype="bfloat16")
    reference = Reference(smollm2, torch.float32)
    for name, part in (("nixl", slice(0, 10)), ("stream-overlapped", slice(10, 20))):
        expected = [alone.generate([prompt], SamplingParams(**GREEDY))[0] for prompt in prompts[part]]
        with start(smollm2, name, "bfloat16") as cluster:
            arm = Arm(cluster.start_workers(), TRANSPORTS[name])
            texts = [(await generate(arm, [prompt], GREEDY, ""))[0] for prompt in prompts[part]]
        judged = [
            reference.judge(*each) for each in zip(list(PROMPTS)[part], prompts[part], texts, expected, strict=True)
        ]
        # Alone it is the same computation.
        assert_equal_but_for_near_ties(judged, min_equal=9)

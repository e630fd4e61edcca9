"""A model whose layers all have a window, over real processes: transformers' tokens, and only the window moves."""

import asyncio
from pathlib import Path

import pytest
import torch

from tailrace.client import AsyncClient, Completion
from tests.helpers.cluster import MODEL, Cluster
from tests.helpers.teacher_forcing import Reference
from tests.helpers.tiny_model import TinySize, make_tiny_model
from tests.helpers.traffic import prompt_of

pytestmark = pytest.mark.e2e
SIZE = TinySize(window=48)
ANSWER = 120
LENGTHS = (200, 333, 500)


async def test_answers_from_pools_that_hold_none_of_the_prompts(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path, SIZE)
    prompts = [prompt_of(length, length) for length in LENGTHS]
    options = {"dtype": "float32", "max_model_len": 1024, "max_num_batched_tokens": 64, "transport": "stream"}
    with Cluster(model, num_blocks=24, overlap_scheduling="on", **options) as cluster:
        cluster.start_workers()
        async with AsyncClient(f"127.0.0.1:{cluster.grpc_port}") as client:
            answers = await asyncio.gather(*(_ask(client, prompt) for prompt in prompts))
            again = await _ask(client, [*prompts[2], *answers[2].token_ids, 7])
        ledgers = cluster.wait_until_idle(12.0)
        assert "Traceback" not in cluster.logs()
    assert {ledger.total for ledger in ledgers.values()} == {24}
    reference = Reference(model, torch.float32)
    for prompt, answer in zip(prompts, answers, strict=True):
        comparison = reference.compare("", prompt, answer.token_ids)
        assert list(comparison.actual) == list(comparison.expected)
        assert answer.usage.completion_tokens == len(answer.token_ids) == ANSWER
        # The last token of a prompt sees itself and 47 before it.
        num_blocks = (len(prompt) - 1) // 16 - (len(prompt) - 48) // 16 + 1
        assert answer.usage.transfer_bytes == num_blocks * SIZE.block_bytes
    comparison = reference.compare("", [*prompts[2], *answers[2].token_ids, 7], again.token_ids)
    assert list(comparison.actual) == list(comparison.expected)


async def _ask(client: AsyncClient, prompt: list[int]) -> Completion:
    return await client.complete(prompt, model=MODEL, temperature=0.0, max_tokens=ANSWER, ignore_eos=True)

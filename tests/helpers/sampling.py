"""Batches to sample from: rows of logits with a history each, and parameters that use every feature."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from tailrace.engine.sampler import SampleResult, SamplingState, sample
from tailrace.types import SamplingParams
from tests.helpers.naive_sampler import Row

EOS = (3, 5)


def run(rows: Sequence[Row], eos: tuple[int, ...] = EOS) -> SampleResult:
    """Every row in a slot of its own; slots and rows are in different orders on purpose."""
    num, vocab = len(rows), len(rows[0].logits)
    slots = [(7 * index + 3) % num if math.gcd(7, num) == 1 else index for index in range(num)]
    state = SamplingState(num, vocab, eos, "cpu")
    tokens = torch.full((num, 64), vocab - 1, dtype=torch.int32)
    for slot, row in zip(slots, rows, strict=True):
        state.set(slot, row.params, len(row.prompt))
        tokens[slot, : row.position] = torch.tensor([*row.prompt, *row.output], dtype=torch.int32)
    logits = torch.tensor(np.stack([row.logits for row in rows]), dtype=torch.float32)
    before = logits.clone()
    choices, positions = [row.choice for row in rows], [row.position for row in rows]
    result = sample(
        logits, state, torch.tensor(slots), torch.tensor(choices), torch.tensor(positions), tokens, slots
    ).wait()
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    return result


def random_row(seed: int, params: SamplingParams, vocab: int = 200) -> Row:
    """A prompt of 1 to 8 and an output of 0 to 12 tokens, repeats among them."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2.5, vocab).astype(np.float32).astype(np.float64)
    prompt = rng.integers(0, 30, rng.integers(1, 9)).tolist()
    output = rng.integers(0, 30, rng.integers(0, 13)).tolist()
    return Row(logits, replace(params, seed=seed * 7919 + (seed << 40)), prompt, output, choice=seed % 3)


def hot(logits: Sequence[float], **params: float) -> Row:
    return Row(np.array(logits, dtype=np.float64), SamplingParams(**params), prompt=[0], output=[])  # type: ignore[arg-type]


FEATURES = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(temperature=0.7),
    "hot": SamplingParams(temperature=1.9),
    "top_k": SamplingParams(top_k=7),
    "top_k_beyond_vocabulary": SamplingParams(top_k=100_000),
    "top_p": SamplingParams(top_p=0.8),
    "min_p": SamplingParams(min_p=0.1),
    "repetition": SamplingParams(repetition_penalty=1.4),
    "repetition_reward": SamplingParams(repetition_penalty=0.7),
    "presence": SamplingParams(presence_penalty=1.5),
    "frequency": SamplingParams(frequency_penalty=0.9),
    "negative_penalties": SamplingParams(presence_penalty=-1.0, frequency_penalty=-0.5),
    "bias": SamplingParams(logit_bias=((0, 4.0), (17, -100.0), (199, 3.0))),
    "min_tokens": SamplingParams(min_tokens=6, stop_token_ids=(9, 2)),
    "min_tokens_ignoring_eos": SamplingParams(min_tokens=6, ignore_eos=True, stop_token_ids=(9,)),
    "masks": SamplingParams(temperature=1.3, top_k=30, top_p=0.9, min_p=0.02),
    "greedy_penalised": SamplingParams(temperature=0.0, repetition_penalty=1.8, frequency_penalty=0.4),
    "everything": SamplingParams(
        temperature=1.2,
        top_k=40,
        top_p=0.95,
        min_p=0.01,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias=((1, 2.0), (50, -3.0)),
        min_tokens=4,
        stop_token_ids=(11,),
        logprobs=3,
    ),
}

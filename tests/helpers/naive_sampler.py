"""The sampler again, one row at a time in numpy and Python integers: what the batched one is compared with."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tailrace.types import SamplingParams

_LOW_32 = 0xFFFFFFFF


def philox4x32(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Ten rounds, written from the paper's formulas with Python's unbounded integers."""
    words, (k0, k1) = list(counter), key
    for round_ in range(10):
        a, b = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        r0, r1 = (k0 + round_ * 0x9E3779B9) & _LOW_32, (k1 + round_ * 0xBB67AE85) & _LOW_32
        words = [(b >> 32) ^ words[1] ^ r0, b & _LOW_32, (a >> 32) ^ words[3] ^ r1, a & _LOW_32]
    return tuple(words)


def uniform(seed: int, choice: int, position: int) -> float:
    high, low, *_ = philox4x32((position, choice, 0, 0), (seed & _LOW_32, seed >> 32))
    return ((high >> 5) * 2**26 + (low >> 6)) / 2**53


@dataclass
class Row:
    logits: NDArray[np.float64]
    params: SamplingParams
    prompt: list[int]
    output: list[int]
    choice: int = 0

    @property
    def position(self) -> int:
        return len(self.prompt) + len(self.output)


def adjusted(row: Row, eos: tuple[int, ...]) -> NDArray[np.float64]:
    params, logits = row.params, row.logits.astype(np.float64).copy()
    for token, value in params.logit_bias:
        logits[token] += value
    if len(row.output) < params.min_tokens:
        logits[[*params.stop_token_ids, *(() if params.ignore_eos else eos)]] = -np.inf
    for token in {*row.prompt, *row.output}:
        factor = params.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token in set(row.output):
        logits[token] -= params.presence_penalty + row.output.count(token) * params.frequency_penalty
    return logits


def distribution(row: Row, eos: tuple[int, ...] = ()) -> NDArray[np.float64]:
    """The probabilities drawn from; not those of greedy rows. They add up to one."""
    params, logits = row.params, adjusted(row, eos)
    weights = np.exp((logits - logits.max()) / params.temperature)
    probs = weights / weights.sum()
    probs[probs < params.min_p * probs.max()] = 0
    if params.top_k > 0:
        probs[probs < np.sort(probs)[::-1][: params.top_k][-1]] = 0
    if params.top_p < 1:
        falling = np.sort(probs)[::-1]
        held_before = np.cumsum(falling) - falling
        kept = falling[held_before < params.top_p * probs.sum()]
        probs[probs < kept[-1]] = 0
    return probs / probs.sum()


def draw(row: Row, eos: tuple[int, ...] = ()) -> int:
    if row.params.temperature == 0:
        return int(np.argmax(adjusted(row, eos)))
    cumulative = np.cumsum(distribution(row, eos))
    return int(np.searchsorted(cumulative, uniform(row.params.seed, row.choice, row.position), side="right"))

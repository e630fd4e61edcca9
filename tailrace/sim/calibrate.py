"""A hardware profile from measurements, by least squares: what a step of prefill, a token, a square token and a token
of KV before a chunk cost, a decode step by its rows and its context, and a fetch beside its bytes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tailrace.sim.profile import HardwareProfile

_NUM_COSTS = 4


@dataclass(frozen=True, slots=True)
class PrefillSample:
    """One prompt that an idle worker computed in steps of at most `chunk_tokens`."""

    cached_tokens: int
    prompt_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class DecodeSample:
    """Steps of a batch on an otherwise idle machine, what is between two steps included."""

    num_rows: int
    num_context: int
    """Tokens of all rows."""
    seconds: float


@dataclass(frozen=True, slots=True)
class FetchSample:
    """A prefix that an idle worker fetched from an idle holder in one loan."""

    num_bytes: int
    seconds: float


def calibrated(base: HardwareProfile, samples: Sequence[PrefillSample]) -> HardwareProfile:
    """`base` with the prefill's rates and its fixed time a step as the samples have them.

    Relative errors are what is least: a prompt of 32 tokens counts as much as one of 2,048. No cost is below 0. Raises
    ValueError when the samples do not tell the costs apart: they need four different prompts at least.
    """
    kinds = {(sample.cached_tokens, sample.prompt_tokens) for sample in samples}
    if len(kinds) < _NUM_COSTS:
        raise ValueError(f"prefills of {_NUM_COSTS} lengths at least are needed, got {len(kinds)}")
    terms = np.array([_terms(base, sample) for sample in samples])
    seconds = np.array([sample.seconds for sample in samples])
    step_s, token_s, square_s, context_s = _least_squares(terms / seconds[:, None])
    if token_s <= 0.0:
        raise ValueError("the samples take no longer with more tokens")
    return replace(
        base,
        step_overhead_s=min(step_s, base.step_overhead_s),
        prefill_overhead_s=max(0.0, step_s - base.step_overhead_s),
        context_s_per_token=context_s,
        flops_per_s=2.0 * base.num_parameters / token_s,
        attention_flops_per_s=2.0 * base.num_layers * base.hidden_size / square_s if square_s > 0.0 else float("inf"),
    )


def with_decode(base: HardwareProfile, samples: Sequence[DecodeSample]) -> HardwareProfile:
    """`base` with what a decode step costs, a row in it and a token of their context, by least squares.

    None is below 0; context that cannot be told from noise costs what it did. Raises ValueError for fewer than three
    kinds of batches.
    """
    if len({(sample.num_rows, sample.num_context) for sample in samples}) < 3:
        raise ValueError("batches of 3 kinds at least are needed")
    terms = np.array([(1.0, sample.num_rows, sample.num_context) for sample in samples])
    seconds = np.array([sample.seconds for sample in samples])
    step_s, row_s, token_s = _least_squares(terms / seconds[:, None])
    rate = base.kv_bytes_per_token / token_s if token_s > 0.0 else base.memory_bytes_per_s
    weight_bytes = max(0.0, step_s - base.step_overhead_s) * rate
    return replace(base, memory_bytes_per_s=rate, weight_bytes=weight_bytes, step_per_row_s=row_s)


def with_fetches(base: HardwareProfile, samples: Sequence[FetchSample]) -> HardwareProfile:
    """`base` with the fixed cost of a fetch and the rate of a link as the samples have them, by least squares.

    Neither is below 0. Raises ValueError for samples that are all of one length.
    """
    if len({sample.num_bytes for sample in samples}) < 2:
        raise ValueError("fetches of 2 lengths at least are needed")
    terms = np.array([(1.0, sample.num_bytes) for sample in samples])
    seconds = np.array([sample.seconds for sample in samples])
    overhead_s, byte_s = _least_squares(terms / seconds[:, None])
    return replace(
        base, fetch_overhead_s=overhead_s, link_bytes_per_s=1.0 / byte_s if byte_s > 0.0 else base.link_bytes_per_s
    )


def _terms(base: HardwareProfile, sample: PrefillSample) -> tuple[float, ...]:
    """How many steps, tokens, square tokens and tokens of KV before its chunks it is."""
    start, end = sample.cached_tokens, sample.prompt_tokens
    starts = range(start, end, base.chunk_tokens)
    return len(starts), end - start, end * end - start * start, sum(starts)


def _least_squares(relative: NDArray[np.float64]) -> list[float]:
    """Costs x >= 0 for which each row times x is as near to 1 as can be; the worst negative one is dropped first."""
    kept = list(range(relative.shape[1]))
    costs = np.zeros(relative.shape[1])
    while kept:
        found, *_ = np.linalg.lstsq(relative[:, kept], np.ones(len(relative)), rcond=None)
        if found.min() >= 0.0:
            costs[kept] = found
            break
        kept.pop(int(found.argmin()))
    return [float(cost) for cost in costs]

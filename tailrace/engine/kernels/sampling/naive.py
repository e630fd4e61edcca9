"""Penalties, masks and the draw in plain torch: the spec of the op, and what runs on a CPU.

Every function treats each row by itself, and bit for bit alike whatever the other rows are: sums of probabilities are
taken over multiples of 2**-52 below 2, which float64 adds without rounding in any order, and the only transcendental
function is torch's softmax, whose kernel goes row by row.
"""

import torch
from torch import Tensor

_RADIX = 1024
_LEAST_MASS = 2.0**-52
"""What a probability counts as at least, if it counts at all."""


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of `logits` [R, vocab] the largest [R] and its lowest id [R] int64; NaN and where, if there is one.

    numpy's search: torch's takes ten times as long on one core (0.8 ms for 32 rows of 49,152, measured).
    """
    if not len(logits):
        return logits.new_empty(0), torch.empty(0, dtype=torch.int64)
    ids = torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.gather(1, ids[:, None])[:, 0], ids


def penalize(
    logits: Tensor,  # [R, vocab] float32, changed in place
    history: Tensor,  # [R, length] int64: prompt and output; entries at and after `positions` mean nothing
    positions: Tensor,  # [R] int64 >= 1: tokens before the one being drawn
    num_prompt_tokens: Tensor,  # [R] int64
    repetition: Tensor,  # [R] float32
    presence: Tensor,  # [R] float32
    frequency: Tensor,  # [R] float32
) -> None:
    """Repetition penalty for tokens of prompt and output, then presence and frequency penalty for those of the output.

    Repetition as in Keskar et al., CTRL (2019): a logit above zero is divided by it, one below is multiplied.
    """
    columns = torch.arange(history.shape[1], device=history.device)
    is_past = columns < positions[:, None]
    # A column that means nothing repeats the row's first token: each place is written with one and the same value.
    history = torch.where(is_past, history, history[:, :1])
    is_output = is_past & (columns >= num_prompt_tokens[:, None])
    counts = torch.zeros_like(logits).scatter_add_(1, history, is_output.to(logits.dtype)).gather(1, history)
    values = logits.gather(1, history)
    values = torch.where(values > 0, values / repetition[:, None], values * repetition[:, None])
    values -= counts * frequency[:, None] + (counts > 0) * presence[:, None]
    logits.scatter_(1, history, values)


def probabilities(logits: Tensor, temperature: Tensor) -> Tensor:
    """softmax(logits / temperature), [R, vocab] float32; `temperature` [R] > 0.

    The largest logit is taken off first: dividing by a tiny temperature cannot overflow then.
    """
    scaled = logits - logits.amax(dim=-1, keepdim=True)
    return torch.softmax(scaled.div_(temperature[:, None]), dim=-1)


def mask_min_p(probs: Tensor, min_p: Tensor) -> None:
    """Zero, in place, what is less likely than `min_p` [R] times the row's most likely token."""
    floor = min_p[:, None] * probs.amax(dim=-1, keepdim=True)
    probs.masked_fill_(probs < floor, 0.0)


def mask_top_k(probs: Tensor, top_k: Tensor) -> None:
    """Zero, in place, all but the `top_k` [R] >= 1 most likely tokens; tokens tied with the last of them stay."""
    top_k = top_k.clamp(max=probs.shape[-1])
    largest = probs.topk(int(top_k.max()), dim=-1).values
    floor = largest.gather(1, top_k[:, None] - 1)
    probs.masked_fill_(probs < floor, 0.0)


def mask_top_p(probs: Tensor, top_p: Tensor) -> None:
    """Zero, in place, all but the fewest most likely tokens that hold `top_p` [R] of the row's remaining probability.

    Tokens tied with the last of them stay, and the most likely one always does.
    """
    mass = _exact(probs)
    wanted = (top_p.double()[:, None] * mass.sum(dim=-1, keepdim=True)).clamp_(min=_LEAST_MASS)
    probs.masked_fill_(probs < _nucleus_floor(probs, mass, wanted), 0.0)


def _nucleus_floor(probs: Tensor, mass: Tensor, wanted: Tensor) -> Tensor:
    """[R, 1]: the largest probability such that the tokens at least that likely hold `wanted` [R, 1].

    A radix search, without sorting: floats above zero are ordered as their bits are, so the mass is summed by the
    uppermost 10 of their 30 bits (none exceeds 1.0), then by the next 10 within the bin where the bound falls, and by
    the last. Sums are exact, hence so is the result; it does not vary with how flat the row is.
    """
    bits = probs.view(torch.int32)
    prefix = torch.zeros_like(wanted, dtype=torch.int32)
    bins = torch.zeros(probs.shape[0], _RADIX, dtype=torch.float64, device=probs.device)
    for shift in (20, 10, 0):
        is_inside = (bits >> (shift + 10)) == prefix
        digits = ((bits >> shift) & (_RADIX - 1)).long()
        bins.zero_().scatter_add_(1, digits, torch.where(is_inside, mass, 0.0))
        held = bins.flip(-1).cumsum(dim=-1)
        above = (held < wanted).sum(dim=-1, keepdim=True).clamp_(max=_RADIX - 1)
        held_above = held.gather(1, (above - 1).clamp_(min=0))
        wanted = wanted - torch.where(above > 0, held_above, 0.0)
        prefix = (prefix << 10) | (_RADIX - 1 - above).int()
    return prefix.view(torch.float32)


def _exact(probs: Tensor) -> Tensor:
    """float64, rounded to multiples of 2**-52: sums of them below 2 are exact, whatever their order."""
    return probs.double().add_(1.0).sub_(1.0)


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Token ids [R] by inverting the cumulative distribution in the order of the vocabulary.

    `probs` [R, vocab] float32 >= 0, of any sum below 2; `uniform` [R] float64 in [0, 1). In vocabulary order two tokens
    of nearly equal probability that swap ranks leave the draw alone. A token of probability 0 is never drawn: it is the
    first one whose cumulative sum exceeds the target, capped at the first one that reaches the total.
    """
    cumulative = _exact(probs).cumsum_(dim=-1)
    total = cumulative[:, -1:].contiguous()
    drawn = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
    last = torch.searchsorted(cumulative, total)
    return torch.minimum(drawn, last)[:, 0]

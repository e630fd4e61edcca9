"""Log-probabilities of the drawn tokens and of the most likely ones."""

import torch
from torch import Tensor

from tailrace.types import TokenLogprob

_LOW_32 = 0xFFFFFFFF


def top_tokens(values: Tensor, count: int) -> Tensor:
    """Ids [R, count] of the largest of `values` [R, vocab] float32, falling; of equal ones the lower id comes first.

    topk alone leaves the order of ties open; value and id packed into one integer have none.
    """
    bits = values.view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    ids = torch.arange(values.shape[-1], device=values.device)
    keys = (ordered << 32) | (_LOW_32 - ids)
    return _LOW_32 - (keys.topk(count, dim=-1).values & _LOW_32)


def token_logprobs(logits: Tensor, token_ids: Tensor, counts: list[int]) -> list[TokenLogprob]:
    """For each row of `logits` [R, vocab] float32 the log-softmax of its token and of its `counts` most likely ones."""
    values = torch.log_softmax(logits, dim=-1)
    chosen: list[float] = values.gather(1, token_ids[:, None])[:, 0].tolist()
    most = min(max(counts), values.shape[-1])
    if most == 0:
        return [TokenLogprob(logprob) for logprob in chosen]
    top = top_tokens(values, most)
    rows = zip(chosen, counts, top.tolist(), values.gather(1, top).tolist(), strict=True)
    return [
        TokenLogprob(logprob, tuple(zip(ids[:count], likely[:count], strict=True)))
        for logprob, count, ids, likely in rows
    ]

"""Log-probabilities of the drawn tokens and of the most likely ones."""

import torch
from torch import Tensor

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


def token_logprobs(logits: Tensor, token_ids: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of `logits` [R, vocab] float32 the log-softmax of its token [R], and its `count` most likely tokens:
    ids [R, count] int64 and log-softmax [R, count].
    """
    values = torch.log_softmax(logits, dim=-1)
    top = top_tokens(values, min(count, values.shape[-1])) if count else token_ids.new_empty(len(values), 0)
    return values.gather(1, token_ids[:, None])[:, 0], top, values.gather(1, top)

"""What both schedulers say about a request: its tokens, where it stands in line, when a choice is over."""

from dataclasses import dataclass, field

from tailrace.types import FinishReason, SamplingParams, TokenLogprob


@dataclass(slots=True, eq=False)
class Request:
    """One leg of a request as a scheduler sees it. `id` is the worker's own, in order of arrival."""

    id: int
    tokens: list[int]
    """Prompt, then tokens replayed from an earlier attempt."""
    num_prompt_tokens: int
    sampling: SamplingParams
    choices: tuple[int, ...] = (0,)
    priority: int = 0
    hash_seed: bytes = b""
    hashes: list[bytes] = field(default_factory=list)
    """Of every full block of `tokens`."""
    tenant: str = ""
    """On whose quota a store keeps its blocks."""

    @property
    def rank(self) -> tuple[int, int]:
        """Lower runs first: priority, then first come, first served."""
        return (self.priority, self.id)


@dataclass(frozen=True, slots=True)
class DrawnToken:
    """A token drawn for a choice; `finish_reason` is set when it is the choice's last."""

    choice: int
    token_id: int
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    is_bad: bool = False
    """Nothing could be drawn: `token_id` means nothing, and the request cannot go on."""


@dataclass(frozen=True, slots=True)
class StopRule:
    """What ends a choice on this worker, whatever the request says."""

    eos_token_ids: frozenset[int]
    max_model_len: int

    def finish_reason(self, token_id: int, num_tokens: int, request: Request) -> FinishReason | None:
        """`num_tokens` counts the sequence with `token_id` as its last token."""
        sampling = request.sampling
        is_stop = token_id in sampling.stop_token_ids or (token_id in self.eos_token_ids and not sampling.ignore_eos)
        if is_stop and num_tokens - request.num_prompt_tokens > sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if num_tokens >= self.limit(request) else None

    def limit(self, request: Request) -> int:
        """A sequence of this many tokens is over, whatever they are."""
        return min(request.num_prompt_tokens + request.sampling.max_tokens, self.max_model_len)

    def ending_tokens(self, request: Request) -> frozenset[int]:
        """Those that end a sequence unless it is too short for it."""
        sampling = request.sampling
        return frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self.eos_token_ids)


def blocks_for(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)

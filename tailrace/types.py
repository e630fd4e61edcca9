"""Words that every room shares: roles, sampling, sampled tokens."""

from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import NamedTuple


class Role(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    KVSTORE = "kvstore"
    """Keeps blocks, computes nothing."""


class FinishReason(IntEnum):
    """Numbers are those of `tailrace.v1.FinishReason` on the wire."""

    STOP = 1
    LENGTH = 2

    @property
    def openai(self) -> str:
        return self.name.lower()


class SequenceKey(NamedTuple):
    """One choice of one request on one worker; `handle` is the worker's short name of (gateway, request, attempt)."""

    handle: int
    choice: int


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. Meanings are those of the OpenAI and vLLM APIs; defaults mean "off"."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    """None: off; k: the chosen token's and the k most likely ones'."""
    seed: int = 0
    """64 bits; draws are keyed by (seed, choice, position)."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probabilities under the model's own distribution, before temperature, penalties and masks."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob), most likely first."""

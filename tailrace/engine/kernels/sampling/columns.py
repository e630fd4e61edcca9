"""How a slot's sampling parameters lie in memory, for the sampler that writes them and the kernels that read them."""

from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor


class Feature(IntEnum):
    """What a slot may use beyond argmax; the number is its row in `SamplingState.flags`."""

    DRAW = 0
    BIAS = 1
    MIN_TOKENS = 2
    PENALTIES = 3
    MIN_P = 4
    TOP_K = 5
    TOP_P = 6
    LOGPROBS = 7


class FloatColumn(IntEnum):
    TEMPERATURE = 0
    TOP_P = 1
    MIN_P = 2
    REPETITION = 3
    PRESENCE = 4
    FREQUENCY = 5


class IntColumn(IntEnum):
    SEED_LOW = 0
    SEED_HIGH = 1
    TOP_K = 2
    MIN_TOKENS = 3
    PROMPT_TOKENS = 4


@dataclass(frozen=True, slots=True)
class SlotTensors:
    """The parameters of every slot."""

    floats: Tensor
    """[slots, FloatColumn] float32"""
    ints: Tensor
    """[slots, IntColumn] int64"""
    flags: Tensor
    """[Feature, slots] bool"""
    bias_ids: Tensor
    bias_values: Tensor
    """[slots, width] int64 and float32: what is added to a slot's logits, then (0, 0.0)."""
    forbidden_ids: Tensor
    forbidden_values: Tensor
    """Likewise, of tokens that may not be drawn before min_tokens."""

    @property
    def all(self) -> tuple[Tensor, ...]:
        added = (self.bias_ids, self.bias_values, self.forbidden_ids, self.forbidden_values)
        return self.floats, self.ints, self.flags, *added

"""Memory between the operations of a step, kept from step to step."""

import torch
from torch import Tensor

from tailrace.checkpoint.model_config import ModelConfig
from tailrace.engine.native.library import StepStruct


class Workspace:
    """Grows to the largest step so far. A fresh allocation of this size would be faulted in page by page, each step."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, *, rounded_bytes: int) -> None:
        """rounded_bytes: a token's, where weights are int8."""
        self._config = config
        self._rounded_bytes = rounded_bytes
        self._dtype = dtype
        self._num_tokens = 0
        self._partials = torch.empty(0)
        self._logits = torch.empty(0, config.vocab_size)
        self._rounded = torch.empty(0, rounded_bytes, dtype=torch.uint8)
        self._allocate(1)

    def fit(self, num_tokens: int, num_partial_rows: int) -> None:
        """num_partial_rows: decode rows times the parts that each is split into."""
        if num_tokens > self._num_tokens:
            self._allocate(num_tokens)
        config = self._config
        needed = num_partial_rows * config.num_heads * (config.head_dim + 2)
        if needed > self._partials.numel():
            self._partials = torch.empty(needed)

    def fill(self, step: StepStruct) -> None:
        step.places, step.input = self._places.data_ptr(), self._input.data_ptr()
        step.qkv, step.gated = self._qkv.data_ptr(), self._gated.data_ptr()
        step.partials, step.rounded = self._partials.data_ptr(), self._rounded.data_ptr()

    def rounded(self, rows: int) -> int:
        """The address of room for so many rows."""
        if rows > self._rounded.shape[0]:
            self._rounded = torch.empty(rows, self._rounded_bytes, dtype=torch.uint8)
        return self._rounded.data_ptr()

    def logits(self, rows: int) -> Tensor:
        if rows > self._logits.shape[0]:
            self._logits = torch.empty(rows, self._config.vocab_size)
        return self._logits[:rows]

    def _allocate(self, num_tokens: int) -> None:
        config, self._num_tokens = self._config, num_tokens
        heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self._places = torch.empty(num_tokens, 2, dtype=torch.int64)
        self._input = torch.empty(
            num_tokens, max(config.hidden_size, config.num_heads * config.head_dim), dtype=self._dtype
        )
        self._qkv = torch.empty(num_tokens, heads, dtype=self._dtype)
        self._rounded = torch.empty(num_tokens, self._rounded_bytes, dtype=torch.uint8)
        self._gated = torch.empty(num_tokens, config.intermediate_size, dtype=self._dtype)

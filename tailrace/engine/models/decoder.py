"""The decoder-only transformer that all served families are: ModelConfig says in what they differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tailrace.checkpoint.model_config import ModelConfig
from tailrace.engine.batch import AttentionRows, BatchState, StepInputs
from tailrace.engine.kernels.attention_decode import attention_decode
from tailrace.engine.kernels.attention_prefill import attention_prefill
from tailrace.engine.kernels.rms_norm import add_rms_norm, rms_norm
from tailrace.engine.kernels.rope_kv_write import HeadNorms, rope_kv_write
from tailrace.engine.kernels.silu_mul import silu_mul
from tailrace.engine.models.linear import Linear
from tailrace.engine.models.rotary import RotaryTable
from tailrace.plan import StepPlan

# Of a logit: one step of bfloat16, twice over for safety.
_TIE_SHARE = 2**-6
_REFINED_AT_ONCE = 4096

LinearT = TypeVar("LinearT")
"""A product with a weight: a callable, or a weight packed for compiled kernels."""


@dataclass(frozen=True, slots=True)
class LayerWeights(Generic[LinearT]):
    """Projections of one input are fused: queries, keys and values; gates and values of the feed-forward layer."""

    attention_norm: Tensor
    qkv: LinearT
    query_norm: Tensor | None
    key_norm: Tensor | None
    attention_out: LinearT
    mlp_norm: Tensor
    gate_up: LinearT
    down: LinearT


@dataclass(frozen=True, slots=True)
class DecoderWeights(Generic[LinearT]):
    embedding: Tensor
    """[vocab, hidden]"""
    layers: Sequence[LayerWeights[LinearT]]
    final_norm: Tensor
    lm_head: LinearT
    lm_head_rows: Tensor
    """[vocab, hidden]: the head's weight as it came; the embedding itself where they are tied."""


class Decoder:
    """Stateless apart from its weights: keys and values live in the pool it is given."""

    def __init__(
        self, config: ModelConfig, weights: DecoderWeights[Linear], rotary: RotaryTable, *, head_share: float = 0.0
    ) -> None:
        """head_share: of refine_best, for a head whose weights are rounded; 0: they are not."""
        self.config = config
        self._head_share = head_share
        self._weights = weights
        self._rotary = rotary
        self._head_norms = tuple(_head_norms(layer, config.rms_norm_eps) for layer in weights.layers)
        self._windows = tuple(
            config.window if layer in config.windowed_layers else 0 for layer in range(config.num_layers)
        )
        self.windows = sorted(set(self._windows))

    def forward(self, plan: StepPlan, batch: BatchState, pool: Tensor) -> Tensor:
        """Float32 hidden states [tokens, hidden] after the last layer, before its norm; the tokens' KV goes to `pool`.

        The plan's changes are applied to `batch` already.
        pool: [num_blocks, layers, 2, kv_heads, block, head_dim], changed in place.
        """
        return self.compute(batch.inputs(plan, pool, self.windows), pool)

    def compute(self, inputs: StepInputs, pool: Tensor) -> Tensor:
        """As `forward`, from tensors alone: nothing is decided by what is in them."""
        cos, sin = self._rotary.cos[inputs.positions], self._rotary.sin[inputs.positions]
        # The sum over layers is kept in float32: rounding it twice a layer would be most of bfloat16's error.
        hidden = F.embedding(inputs.token_ids, self._weights.embedding).float()
        delta: Tensor | None = None
        for layer, weights in enumerate(self._weights.layers):
            normed = self._normed(hidden, delta, weights.attention_norm)
            qkv = weights.qkv(normed).view(len(hidden), -1, self.config.head_dim)
            rope_kv_write(qkv, cos, sin, pool, layer, inputs.write_rows, self._head_norms[layer])
            attended = self._attend(qkv, pool, layer, inputs)
            normed = self._normed(hidden, weights.attention_out(attended), weights.mlp_norm)
            delta = weights.down(silu_mul(weights.gate_up(normed)))
        return hidden if delta is None else hidden.add_(delta)

    def logits(self, hidden: Tensor, *, reuse: bool = False) -> Tensor:
        """hidden: [rows, hidden] of `forward`. Returns [rows, vocab] float32.

        `reuse`: the result may be overwritten by the next call that says so.
        """
        normed = rms_norm(hidden, self._weights.final_norm, self.config.rms_norm_eps)
        product = self._weights.lm_head(normed)
        logits = product.float()
        if share := self._head_share or (0.0 if product.dtype == torch.float32 else _TIE_SHARE):
            refine_best(logits, normed, self._weights.lm_head_rows, share)
        return logits

    def _normed(self, hidden: Tensor, delta: Tensor | None, weight: Tensor) -> Tensor:
        """Adds `delta` to `hidden`, in place, and returns the norm of the sum."""
        if delta is None:
            return rms_norm(hidden, weight, self.config.rms_norm_eps)
        return add_rms_norm(hidden, delta, weight, self.config.rms_norm_eps)

    def _attend(self, qkv: Tensor, pool: Tensor, layer: int, inputs: StepInputs) -> Tensor:
        """[tokens, heads * head_dim]"""
        queries, keys_values = qkv[:, : self.config.num_heads], qkv[:, self.config.num_heads :]
        rows = inputs.attention[self._windows[layer]]
        if not rows.chunks:
            assert rows.decode is not None
            return attention_decode(queries, pool, layer, rows.decode).flatten(1)
        parts = _attend_mixed(queries, keys_values, pool, layer, rows)
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)


def _head_norms(weights: LayerWeights[Linear], eps: float) -> HeadNorms | None:
    if weights.query_norm is None or weights.key_norm is None:
        return None
    return HeadNorms(weights.query_norm, weights.key_norm, eps)


def _attend_mixed(queries: Tensor, keys_values: Tensor, pool: Tensor, layer: int, rows: AttentionRows) -> list[Tensor]:
    """Decode rows come first in a step's tokens, then chunk after chunk."""
    parts = []
    if rows.decode is not None:
        parts.append(attention_decode(queries[: rows.num_decode], pool, layer, rows.decode))
    for chunk in rows.chunks:
        own = slice(chunk.begin, chunk.end)
        parts.append(attention_prefill(queries[own], keys_values[own], pool, layer, chunk.span))
    return parts


def refine_best(logits: Tensor, normed: Tensor, head_rows: Tensor, share: float = _TIE_SHARE) -> None:
    """Computes the logits nearest to each row's best, within `share` of it, again, in float32 and in place.

    The head's product is rounded to its dtype: bfloat16 leaves steps of 1/8 at 16 to 32, so that the best tokens often
    tie exactly and the order of a sum decides between them. Whatever rounding can have pushed past the true best is
    within one step of the best.
    """
    best = logits.amax(dim=-1, keepdim=True)
    near = logits >= best - best.abs() * share
    rows, tokens = near.nonzero(as_tuple=True)
    # In parts, for the model whose logits are all alike.
    for row, token in zip(torch.split(rows, _REFINED_AT_ONCE), torch.split(tokens, _REFINED_AT_ONCE), strict=True):
        logits[row, token] = (normed[row].float() * head_rows[token].float()).sum(dim=-1)

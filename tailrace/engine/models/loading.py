"""From named tensors to a Decoder: which tensors a config asks for, and how they are fused."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Generic

import torch
from torch import Tensor

from tailrace.checkpoint.model_config import ModelConfig
from tailrace.engine.models.decoder import Decoder, DecoderWeights, LayerWeights, LinearT
from tailrace.engine.models.linear import LinearMaker, WideLinear, can_widen, linear_maker
from tailrace.engine.models.quantization import HEAD_SHARE, RoundedLinear
from tailrace.engine.models.rotary import rotary_table
from tailrace.engine.weights import DummySource, Progress, SafetensorsSource, Shape, TensorSource

_EMBEDDING, _FINAL_NORM, _LM_HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_PROGRESS_LABEL = "loading weights"


def open_source(directory: Path, config: ModelConfig, load_format: str) -> TensorSource:
    """load_format: "auto" or "dummy". Raises CheckpointError as SafetensorsSource does."""
    shapes = tensor_shapes(config)
    if load_format == "dummy":
        return DummySource(shapes)
    return SafetensorsSource(directory, shapes, ignored=_ignored(config))


def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor of a checkpoint of this config, in Hugging Face's names."""
    shapes = {_EMBEDDING: (config.vocab_size, config.hidden_size), _FINAL_NORM: (config.hidden_size,)}
    if not config.tie_word_embeddings:
        shapes[_LM_HEAD] = shapes[_EMBEDDING]
    for layer in range(config.num_layers):
        shapes.update((f"model.layers.{layer}.{name}", shape) for name, shape in _layer_shapes(config))
    return shapes


@dataclass(frozen=True, slots=True)
class LinearMakers(Generic[LinearT]):
    """How fused weights become products. Each takes (weight [outputs, inputs], bias [outputs] or None)."""

    plain: Callable[[Tensor, Tensor | None], LinearT]
    gated: Callable[[Tensor, Tensor | None], LinearT]
    """Of the fused gates and values of a feed-forward layer."""


def load_decoder(
    source: TensorSource,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    quantization: str = "none",
    progress: Progress | None = None,
) -> Decoder:
    """The decoder in torch's own operations."""
    plain, is_rounded = linear_maker(dtype, device), quantization == "int8"
    make: LinearMaker = partial(RoundedLinear, make=plain) if is_rounded else plain
    makers = LinearMakers(make, make)
    weights = load_weights(source, config, makers, dtype=dtype, device=device, progress=progress)
    if can_widen(dtype, device):
        weights = replace(weights, lm_head=WideLinear(weights.lm_head_rows))
    rotary = rotary_table(config.rope, config.head_dim, max_model_len, device)
    return Decoder(config, weights, rotary, head_share=HEAD_SHARE if is_rounded else 0.0)


def load_weights(
    source: TensorSource,
    config: ModelConfig,
    makers: LinearMakers[LinearT],
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
) -> DecoderWeights[LinearT]:
    """Converts, fuses and packs layer by layer, so that little more than the served weights is ever in memory."""
    return _Loader(source, config, makers, dtype, device, progress).load()


def _layer_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
    projections = (
        ("self_attn.q_proj", config.num_heads * head_dim, hidden, config.qkv_bias),
        ("self_attn.k_proj", config.num_kv_heads * head_dim, hidden, config.qkv_bias),
        ("self_attn.v_proj", config.num_kv_heads * head_dim, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, config.num_heads * head_dim, config.output_bias),
        ("mlp.gate_proj", inner, hidden, config.mlp_bias),
        ("mlp.up_proj", inner, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, inner, config.mlp_bias),
    )
    for name, outputs, inputs, has_bias in projections:
        yield f"{name}.weight", (outputs, inputs)
        if has_bias:
            yield f"{name}.bias", (outputs,)
    if config.qk_norm:
        yield "self_attn.q_norm.weight", (head_dim,)
        yield "self_attn.k_norm.weight", (head_dim,)


def _ignored(config: ModelConfig) -> list[str]:
    """Tensors of old checkpoints that say nothing new: tables computed from the config, a tied head's copy."""
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(config.num_layers)]
    return [*names, _LM_HEAD] if config.tie_word_embeddings else names


class _Loader(Generic[LinearT]):
    """One load: knows the target and counts what is done."""

    def __init__(
        self,
        source: TensorSource,
        config: ModelConfig,
        makers: LinearMakers[LinearT],
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None,
    ) -> None:
        self._source = source
        self._config = config
        self._dtype = dtype
        self._device = device
        self._progress = progress
        self._makers = makers
        self._shapes = tensor_shapes(config)
        self._total = sum(map(prod, self._shapes.values())) * dtype.itemsize
        self._done = 0

    def load(self) -> DecoderWeights[LinearT]:
        embedding = self._tensor(_EMBEDDING)
        head = embedding if self._config.tie_word_embeddings else self._tensor(_LM_HEAD)
        return DecoderWeights(
            embedding=embedding,
            layers=[self._layer(f"model.layers.{layer}.") for layer in range(self._config.num_layers)],
            final_norm=self._tensor(_FINAL_NORM),
            lm_head=self._makers.plain(head, None),
            lm_head_rows=head,
        )

    def _layer(self, prefix: str) -> LayerWeights[LinearT]:
        attention = f"{prefix}self_attn."
        has_norm = self._config.qk_norm
        return LayerWeights(
            attention_norm=self._tensor(f"{prefix}input_layernorm.weight"),
            qkv=self._linear(f"{attention}q_proj", f"{attention}k_proj", f"{attention}v_proj"),
            query_norm=self._tensor(f"{attention}q_norm.weight") if has_norm else None,
            key_norm=self._tensor(f"{attention}k_norm.weight") if has_norm else None,
            attention_out=self._linear(f"{attention}o_proj"),
            mlp_norm=self._tensor(f"{prefix}post_attention_layernorm.weight"),
            gate_up=self._makers.gated(*self._fused((f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj"))),
            down=self._linear(f"{prefix}mlp.down_proj"),
        )

    def _linear(self, *names: str) -> LinearT:
        return self._makers.plain(*self._fused(names))

    def _fused(self, names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of projections of one input, as of one."""
        weight = torch.cat([self._tensor(f"{name}.weight") for name in names])
        has_bias = f"{names[0]}.bias" in self._shapes
        return weight, torch.cat([self._tensor(f"{name}.bias") for name in names]) if has_bias else None

    def _tensor(self, name: str) -> Tensor:
        tensor = self._source.tensor(name).to(device=self._device, dtype=self._dtype)
        self._done += tensor.nbytes
        if self._progress is not None:
            self._progress(_PROGRESS_LABEL, self._done, self._total)
        return tensor

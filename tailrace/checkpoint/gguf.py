"""Converting a GGUF file into the directory format of Hugging Face, so that serving knows one format only."""

import json
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tailrace.checkpoint.gguf_file import GgufFile
from tailrace.checkpoint.gguf_tokenizer import write_tokenizer
from tailrace.checkpoint.tensor_file import write_bfloat16_file
from tailrace.errors import CheckpointError

CONVERSION_VERSION = 1
"""Part of the name of a converted directory: raise it whenever what is written changes."""

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The sizes a Llama GGUF announces, and whether its output matrix is its own."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    rope_theta: float
    rms_norm_eps: float
    tied: bool


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """Where a tensor comes from; `num_heads` > 0 says that its rows have to be put back in order per head."""

    source: str
    shape: tuple[int, ...]
    num_heads: int = 0


def convert_gguf(source: Path, directory: Path, *, progress: Callable[[int, int], None] | None = None) -> None:
    """Write config.json, generation_config.json, the tokenizer's files and model.safetensors (bf16) into `directory`.

    `directory` exists and is empty. `progress` gets (bytes written, bytes in all) of the weights. Raises
    CheckpointError for anything truncated or not supported, by name; what is in `directory` then is of no use.
    """
    file = GgufFile(source)
    shape = read_shape(file)
    plans = plan_tensors(file, shape)
    _write_json(directory / "config.json", model_config(file, shape))
    _write_json(directory / "generation_config.json", generation_config(file))
    write_tokenizer(file, directory, shape.context_length)
    _write_weights(file, plans, directory / "model.safetensors", progress)


def read_shape(file: GgufFile) -> LlamaShape:
    architecture = file.text("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"unsupported GGUF architecture {architecture!r} (general.architecture); known: llama")
    scaling = sorted(key for key in file.keys if key.startswith("llama.rope.scaling."))
    if scaling:
        raise CheckpointError(f"unsupported GGUF fields: {', '.join(scaling)}")
    num_heads = _positive(file, "llama.attention.head_count")
    hidden_size = _positive(file, "llama.embedding_length")
    return LlamaShape(
        vocab_size=len(file.texts("tokenizer.ggml.tokens")),
        hidden_size=hidden_size,
        intermediate_size=_positive(file, "llama.feed_forward_length"),
        num_layers=_positive(file, "llama.block_count"),
        num_heads=num_heads,
        num_kv_heads=file.integer("llama.attention.head_count_kv", num_heads),
        head_dim=_head_dim(file, hidden_size // num_heads),
        context_length=_positive(file, "llama.context_length"),
        rope_theta=file.number("llama.rope.freq_base"),
        rms_norm_eps=file.number("llama.attention.layer_norm_rms_epsilon"),
        tied="output.weight" not in file.tensor_names,
    )


def _positive(file: GgufFile, key: str) -> int:
    value = file.integer(key)
    if value <= 0:
        raise CheckpointError(f"{file.path}: {key} is {value}, not positive")
    return value


def _head_dim(file: GgufFile, default: int) -> int:
    head_dim = file.integer("llama.attention.key_length", default)
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if file.integer(key, head_dim) != head_dim:
            raise CheckpointError(
                f"{file.path}: unsupported {key} {file.integer(key)}, the head dimension is {head_dim}"
            )
    return head_dim


def _layer_plans(shape: LlamaShape, layer: int) -> dict[str, TensorPlan]:
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    sizes: dict[str, tuple[int, ...]] = {
        "attn_norm": (shape.hidden_size,),
        "ffn_norm": (shape.hidden_size,),
        "attn_q": (queries, shape.hidden_size),
        "attn_k": (keys, shape.hidden_size),
        "attn_v": (keys, shape.hidden_size),
        "attn_output": (shape.hidden_size, queries),
        "ffn_gate": (shape.intermediate_size, shape.hidden_size),
        "ffn_up": (shape.intermediate_size, shape.hidden_size),
        "ffn_down": (shape.hidden_size, shape.intermediate_size),
    }
    permuted = {"attn_q": shape.num_heads, "attn_k": shape.num_kv_heads}
    return {
        f"model.layers.{layer}.{target}.weight": TensorPlan(
            f"blk.{layer}.{source}.weight", sizes[source], permuted.get(source, 0)
        )
        for source, target in _LAYER_TENSORS.items()
    }


def plan_tensors(file: GgufFile, shape: LlamaShape) -> dict[str, TensorPlan]:
    """Our tensor names and where each comes from. CheckpointError for one too many, missing or of a wrong shape."""
    matrix = (shape.vocab_size, shape.hidden_size)
    plans = {"model.embed_tokens.weight": TensorPlan("token_embd.weight", matrix)}
    for layer in range(shape.num_layers):
        plans |= _layer_plans(shape, layer)
    plans["model.norm.weight"] = TensorPlan("output_norm.weight", (shape.hidden_size,))
    if not shape.tied:
        plans["lm_head.weight"] = TensorPlan("output.weight", matrix)
    _compare_tensors(file, plans)
    return plans


def _compare_tensors(file: GgufFile, plans: dict[str, TensorPlan]) -> None:
    wanted = {plan.source: plan.shape for plan in plans.values()}
    _refuse(file, "lacks", wanted.keys() - file.tensor_names)
    _refuse(file, "has unsupported", file.tensor_names - wanted.keys())
    for name, shape in wanted.items():
        if file.shape(name) != shape:
            raise CheckpointError(f"{file.path}: tensor {name} has shape {file.shape(name)}, its metadata says {shape}")


def _refuse(file: GgufFile, problem: str, names: Set[str]) -> None:
    if names:
        raise CheckpointError(f"{file.path} {problem} tensors: {', '.join(sorted(names)[:4])} ({len(names)} in all)")


def restore_rotary_order(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Undo the row order of q and k in a Llama GGUF, [num_heads * head_dim, hidden].

    llama.cpp rotates neighbours (2i, 2i+1) of a head, Hugging Face's models (i, i + head_dim/2), so its converter
    interleaves the halves of each head; this puts them back one after the other.
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, hidden)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, hidden)


def _write_weights(
    file: GgufFile, plans: dict[str, TensorPlan], path: Path, progress: Callable[[int, int], None] | None
) -> None:
    total = 2 * sum(int(np.prod(plan.shape)) for plan in plans.values())
    written = 0

    def load(name: str) -> NDArray[np.float32]:
        plan = plans[name]
        values = file.tensor(plan.source)
        return restore_rotary_order(values, plan.num_heads) if plan.num_heads else values

    def wrote(num_bytes: int) -> None:
        nonlocal written
        written += num_bytes
        if progress:
            progress(written, total)

    write_bfloat16_file(path, {name: plan.shape for name, plan in plans.items()}, load, wrote=wrote)


def model_config(file: GgufFile, shape: LlamaShape) -> dict[str, object]:
    """config.json of a LlamaForCausalLM, with every field that decides about its numbers spelled out."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context_length,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": shape.tied,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        **_token_ids(file),
        "eos_token_id": file.integer("tokenizer.ggml.eos_token_id"),
    }


def generation_config(file: GgufFile) -> dict[str, object]:
    """generation_config.json: generation ends at the end-of-text token and at the end of a turn, where they differ."""
    ends = [file.integer("tokenizer.ggml.eos_token_id")]
    if "tokenizer.ggml.eot_token_id" in file.keys:
        ends.append(file.integer("tokenizer.ggml.eot_token_id"))
    unique = list(dict.fromkeys(ends))
    return {**_token_ids(file), "eos_token_id": unique[0] if len(unique) == 1 else unique}


def _token_ids(file: GgufFile) -> dict[str, object]:
    roles = {"bos_token_id": "tokenizer.ggml.bos_token_id", "pad_token_id": "tokenizer.ggml.padding_token_id"}
    return {role: file.integer(key) for role, key in roles.items() if key in file.keys}


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

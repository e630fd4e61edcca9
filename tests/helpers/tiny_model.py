"""A small random Llama in Hugging Face's format, with tokenizer and chat template: it starts in seconds."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.helpers.tiny_tokenizers import CHATML_CONFIG, byte_level


@dataclass(frozen=True, slots=True)
class TinySize:
    """`head_dim` and `kv_heads` make the KV as large as a test needs it, at little compute."""

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    context: int = 2048
    window: int = 0
    """Of every layer; 0: none."""
    num_full: int = 0
    """With a window, so many of the first layers have none: a Qwen2."""

    @property
    def block_bytes(self) -> int:
        """Of 16 tokens in float32."""
        return self.layers * 2 * self.kv_heads * 16 * self.head_dim * 4


SMALL = TinySize()
WIDE = TinySize(layers=4, heads=8, kv_heads=8, head_dim=128, context=8192)
"""512 KiB a block in float32: a transfer takes long enough to be met in the middle."""


def make_tiny_model(directory: Path, size: TinySize = SMALL, *, seed: int = 0) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_level()
    vocabulary = tokenizer.get_vocab_size()
    tokenizer.save(str(directory / "tokenizer.json"))
    _write(directory / "tokenizer_config.json", CHATML_CONFIG)
    _write(directory / "config.json", _config(size, vocabulary))
    _write(directory / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [2]})
    save_file(_weights(size, vocabulary, seed), directory / "model.safetensors", {"format": "pt"})
    return directory


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def _config(size: TinySize, vocabulary: int) -> dict[str, object]:
    family = "qwen2" if size.num_full else "mistral" if size.window else "llama"
    mixed = {"use_sliding_window": True, "max_window_layers": size.num_full} if size.num_full else {}
    return {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        **({"sliding_window": size.window} if size.window else {}),
        **mixed,
        "vocab_size": vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.hidden * 2,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": size.context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


def _weights(size: TinySize, vocabulary: int, seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (draw.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32)

    hidden, queries, keys = size.hidden, size.heads * size.head_dim, size.kv_heads * size.head_dim
    weights = {
        "model.embed_tokens.weight": matrix(vocabulary, hidden) * hidden**0.5,
        "model.norm.weight": np.ones(hidden, np.float32),
        # Large logits: a random model would else have ties everywhere.
        "lm_head.weight": matrix(vocabulary, hidden) * 4,
    }
    for layer in range(size.layers):
        shapes = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (hidden * 2, hidden),
            "mlp.up_proj": (hidden * 2, hidden),
            "mlp.down_proj": (hidden, hidden * 2),
        }
        prefix = f"model.layers.{layer}"
        weights |= {f"{prefix}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        for name in ("q_proj", "k_proj"):
            # Sharp attention: a wrong block far back in a long prompt changes the next token.
            weights[f"{prefix}.self_attn.{name}.weight"] *= 2
        if size.num_full:
            for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
                weights[f"{prefix}.self_attn.{name}.bias"] = draw.standard_normal(rows).astype(np.float32) / 4
        weights[f"{prefix}.input_layernorm.weight"] = np.ones(hidden, np.float32)
        weights[f"{prefix}.post_attention_layernorm.weight"] = np.ones(hidden, np.float32)
    return weights

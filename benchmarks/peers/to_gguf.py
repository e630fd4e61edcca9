"""A Llama of Hugging Face's format as a GGUF file with its matrices in bfloat16: like precision for llama.cpp.

Arguments: model directory, file to write. Without a vocabulary: the benchmark speaks in token ids.
"""

import sys
from pathlib import Path

import gguf
import torch
from safetensors import safe_open

from tailrace.checkpoint.model_config import ModelConfig, load_model_config

PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def main(directory: Path, target: Path) -> None:
    config = load_model_config(directory)
    if config.architecture != "LlamaForCausalLM" or config.rope.kind != "default":
        sys.exit(f"to_gguf: only plain Llama models, not {config.architecture} with {config.rope.kind} rope")
    partial = target.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    write_header(writer, config)
    with safe_open(directory / "model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - no mapping
            add_tensor(writer, config, name, weights.get_tensor(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(target)


def write_header(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")


def add_tensor(writer: gguf.GGUFWriter, config: ModelConfig, name: str, tensor: torch.Tensor) -> None:
    target = gguf_name(name)
    if target is None:
        return
    if tensor.dim() == 1:
        writer.add_tensor(target, tensor.float().numpy())
        return
    if "q_proj" in name or "k_proj" in name:
        tensor = interleave(tensor, config.num_heads if "q_proj" in name else config.num_kv_heads)
    raw = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    writer.add_tensor(target, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)


def gguf_name(name: str) -> str | None:
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    base = name.removesuffix(".weight")
    if base in outer:
        return f"{outer[base]}.weight"
    _, _, layer, part = base.split(".", 3)
    return f"blk.{layer}.{PARTS[part]}.weight" if part in PARTS else None


def interleave(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbouring rows of a head, Hugging Face's models rows half a head apart."""
    rows, columns = weight.shape
    halves = weight.view(num_heads, 2, rows // num_heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

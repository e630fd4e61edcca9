"""GGUF to a Hugging Face directory: names, row order, rounding, config, tokenizer; and everything refused."""

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from tailrace.checkpoint.gguf import convert_gguf
from tailrace.checkpoint.tensor_file import to_bfloat16_bits
from tailrace.errors import CheckpointError
from tests.helpers.tiny_gguf import HEADS, HIDDEN, TEMPLATE, TOKENS, TinyGguf, hf_weights, usual_tensors


def convert(tmp_path: Path, tiny: TinyGguf) -> Path:
    source = tiny.write(tmp_path / "tiny.gguf")
    target = tmp_path / "model"
    target.mkdir()
    convert_gguf(source, target)
    return target


@pytest.mark.parametrize("tied", [True, False])
def test_tensors_come_out_as_hugging_face_has_them(tmp_path: Path, tied: bool) -> None:
    directory = convert(tmp_path, TinyGguf(tensors=usual_tensors(tied=tied)))
    written = load_file(directory / "model.safetensors")
    expected = hf_weights(tied=tied)
    assert written.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(written[name], torch.from_numpy(values).bfloat16()), name
    assert json.loads((directory / "config.json").read_text())["tie_word_embeddings"] is tied


def test_quantised_tensors_are_dequantised(tmp_path: Path) -> None:
    directory = convert(tmp_path, TinyGguf(quantization=gguf.GGMLQuantizationType.Q8_0))
    written = load_file(directory / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"].float().numpy()
    expected = hf_weights()["model.layers.1.self_attn.q_proj.weight"]
    assert 0 < np.abs(written - expected).max() < 0.02


def test_rounding_to_bfloat16_is_that_of_torch() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    ties = np.array([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x00008000])
    values = np.concatenate([bits, ties.astype(np.uint32)]).view(np.float32)
    ours = torch.from_numpy(to_bfloat16_bits(values).view(np.int16)).view(torch.bfloat16)
    theirs = torch.from_numpy(values).bfloat16()
    nan = theirs.isnan()
    assert torch.equal(ours.isnan(), nan)
    assert torch.equal(ours[~nan].view(torch.int16), theirs[~nan].view(torch.int16))


def test_the_config_says_everything_that_decides_about_the_numbers(tmp_path: Path) -> None:
    config = json.loads((convert(tmp_path, TinyGguf()) / "config.json").read_text())
    assert config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(TOKENS),
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


@pytest.mark.parametrize(("turn_end", "expected"), [(None, 2), (2, 2), (0, [2, 0])])
def test_generation_ends_at_the_end_of_a_turn_too(tmp_path: Path, turn_end: int | None, expected: object) -> None:
    directory = convert(tmp_path, TinyGguf(fields={"tokenizer.ggml.eot_token_id": turn_end}))
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == expected


def test_the_tokenizer_splits_digits_and_keeps_special_tokens_whole(tmp_path: Path) -> None:
    directory = convert(tmp_path, TinyGguf())
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    encoded = tokenizer.encode("<|im_start|>hello world 12<|im_end|>", add_special_tokens=False)
    assert encoded.tokens == ["<|im_start|>", "hello", "Ġw", "o", "r", "l", "d", "Ġ", "1", "2", "<|im_end|>"]
    assert encoded.ids == [TOKENS.index(token) for token in encoded.tokens]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=True) == "hello world 12"


def test_the_chat_template_and_special_tokens_are_in_the_tokenizer_config(tmp_path: Path) -> None:
    config = json.loads((convert(tmp_path, TinyGguf()) / "tokenizer_config.json").read_text())
    assert config["chat_template"] == TEMPLATE
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert "pad_token" not in config


REFUSED: dict[str, tuple[TinyGguf, str]] = {
    "architecture": (TinyGguf(architecture="mamba"), "unsupported GGUF architecture 'mamba'"),
    "tokenizer model": (TinyGguf(fields={"tokenizer.ggml.model": "t5"}), "unsupported GGUF tokenizer 't5'"),
    "pre-tokenizer": (TinyGguf(fields={"tokenizer.ggml.pre": "odd"}), "unsupported GGUF pre-tokenizer 'odd'"),
    "bos before texts": (TinyGguf(fields={"tokenizer.ggml.add_bos_token": True}), "add_bos_token is set"),
    "rope scaling": (TinyGguf(fields={"llama.rope.scaling.type": "yarn"}), "fields: llama.rope.scaling.type"),
    "partial rotary": (TinyGguf(fields={"llama.rope.dimension_count": 8}), "unsupported llama.rope.dimension_count 8"),
    "missing field": (TinyGguf(fields={"llama.block_count": None}), "no metadata field llama.block_count"),
    "wrong type": (TinyGguf(fields={"llama.block_count": "two"}), "llama.block_count is not of type int"),
    "zero heads": (TinyGguf(fields={"llama.attention.head_count": 0}), "head_count is 0, not positive"),
    "missing tensor": (TinyGguf(tensors={"output_norm.weight": None}), "lacks tensors: output_norm.weight"),
    "extra tensor": (
        TinyGguf(tensors={"rope_freqs.weight": np.ones(8, np.float32)}),
        "has unsupported tensors: rope_freqs.weight",
    ),
    "wrong shape": (
        TinyGguf(tensors={"output_norm.weight": np.ones(HIDDEN + 1, np.float32)}),
        r"output_norm.weight has shape \(65,\), its metadata says \(64,\)",
    ),
    "not a merge": (TinyGguf(fields={"tokenizer.ggml.merges": ["he"]}), "'he' in .*merges is not a pair"),
    "merge of unknown": (TinyGguf(fields={"tokenizer.ggml.merges": ["é é"]}), "do not fit together"),
    "token twice": (TinyGguf(fields={"tokenizer.ggml.tokens": [*TOKENS[:-1], "a"]}), "holds a token twice"),
    "token types": (TinyGguf(fields={"tokenizer.ggml.token_type": [1, 1]}), "2 entries in tokenizer.ggml.token_type"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, name: str) -> None:
    tiny, message = REFUSED[name]
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path, tiny)


def outcome(content: bytes, tmp_path: Path) -> str:
    """ "converted", or the message of the CheckpointError; any other exception fails the test."""
    source, target = tmp_path / "damaged.gguf", tmp_path / "out"
    source.write_bytes(content)
    target.mkdir(exist_ok=True)
    try:
        convert_gguf(source, target)
    except CheckpointError as error:
        return error.message
    return "converted"


def test_a_truncated_file_is_a_checkpoint_error_wherever_it_ends(tmp_path: Path) -> None:
    content = TinyGguf().write(tmp_path / "tiny.gguf").read_bytes()
    assert outcome(content, tmp_path) == "converted"
    ends = [0, 3, 4, 8, 20, 100, *range(200, len(content), len(content) // 40), len(content) - 1]
    messages = {end: outcome(content[:end], tmp_path) for end in ends}
    assert all("damaged.gguf" in message for message in messages.values()), messages


def test_a_damaged_file_raises_nothing_but_checkpoint_errors(tmp_path: Path) -> None:
    content = TinyGguf().write(tmp_path / "tiny.gguf").read_bytes()
    rng = np.random.default_rng(1)
    refused = 0
    for position in rng.integers(0, 4000, 150).tolist():
        damaged = bytearray(content)
        damaged[position] ^= int(rng.integers(1, 256))
        refused += outcome(bytes(damaged), tmp_path) != "converted"
    assert refused > 10


def test_something_else_is_no_gguf(tmp_path: Path) -> None:
    assert "not a GGUF file" in outcome(struct.pack("<Q", 8) + b"{}" * 500, tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot read .*none.gguf"):
        convert_gguf(tmp_path / "none.gguf", tmp_path)


def test_progress_counts_the_bytes_of_the_weights(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    source = TinyGguf().write(tmp_path / "tiny.gguf")
    convert_gguf(source, tmp_path, progress=lambda *step: seen.append(step))
    total = sum(2 * values.size for values in hf_weights().values())
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_transformers_reads_the_directory(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = convert(tmp_path, TinyGguf())
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"
    logits = model(torch.tensor([tokenizer("hello").input_ids])).logits
    assert logits.shape == (1, 1, len(TOKENS))
    assert bool(logits.isfinite().all())

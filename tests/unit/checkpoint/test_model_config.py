"""What of a config.json is understood, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from tailrace.checkpoint.model_config import load_model_config
from tailrace.checkpoint.rope_config import RopeConfig
from tailrace.errors import CheckpointError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": 32}
QWEN2 = {
    **LLAMA,
    "architectures": ["Qwen2ForCausalLM"],
    "use_sliding_window": False,
    "sliding_window": 32,
    "max_window_layers": 3,
}
QWEN3 = {**QWEN2, "architectures": ["Qwen3ForCausalLM"], "head_dim": 32}


def save(directory: Path, values: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    (directory / "config.json").write_text(json.dumps(values))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def test_llama(tmp_path: Path) -> None:
    config = load_model_config(save(tmp_path, LLAMA))
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (4, 8, 2, 8)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm) == (False,) * 4
    assert (config.window, config.windowed_layers) == (0, ())
    assert (config.dtype, config.bos_token_id, config.eos_token_ids) == ("bfloat16", 1, (2,))
    assert config.rope == RopeConfig(theta=500000.0)
    assert not config.tie_word_embeddings


def test_end_tokens_of_both_files_are_united(tmp_path: Path) -> None:
    directory = save(tmp_path, {**LLAMA, "eos_token_id": [2, 5]}, {"eos_token_id": [5, 9]})
    assert load_model_config(directory).eos_token_ids == (2, 5, 9)


@pytest.mark.parametrize(
    ("values", "biases", "qk_norm"),
    [
        ({**LLAMA, "attention_bias": True, "mlp_bias": True}, (True, True, True), False),
        (MISTRAL, (False, False, False), False),
        (QWEN2, (True, False, False), False),
        (QWEN3, (False, False, False), True),
        ({**QWEN3, "attention_bias": True}, (True, True, False), True),
    ],
)
def test_biases_and_norms_of_the_families(
    tmp_path: Path, values: dict[str, Any], biases: tuple[bool, ...], qk_norm: bool
) -> None:
    config = load_model_config(save(tmp_path, values))
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == biases
    assert config.qk_norm is qk_norm


_TYPES = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("values", "windowed"),
    [
        (MISTRAL, (0, 1, 2, 3)),
        ({**MISTRAL, "sliding_window": None}, ()),
        (QWEN2, ()),
        ({**QWEN2, "layer_types": ["full_attention"] * 4}, ()),
        ({**QWEN2, "use_sliding_window": True}, (3,)),
        ({**QWEN2, "use_sliding_window": True, "sliding_window": None}, ()),
        ({**QWEN3, "use_sliding_window": True, "layer_types": _TYPES}, (1, 3)),
    ],
)
def test_windowed_layers(tmp_path: Path, values: dict[str, Any], windowed: tuple[int, ...]) -> None:
    config = load_model_config(save(tmp_path, values))
    assert config.windowed_layers == windowed
    assert config.window == (32 if windowed else 0)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({"rope_scaling": None}, RopeConfig(500000.0)),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, RopeConfig(500000.0, "linear", 4.0)),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 64),
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, RopeConfig(7.0)),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 7.0, **LLAMA3}, "rope_theta": None},
            RopeConfig(7.0, "llama3", 8.0, 1.0, 4.0, 64),
        ),
    ],
)
def test_rope_in_old_and_new_form(tmp_path: Path, fields: dict[str, Any], rope: RopeConfig) -> None:
    assert load_model_config(save(tmp_path, {**LLAMA, **fields})).rope == rope


def test_dtype_in_new_form(tmp_path: Path) -> None:
    values = {key: value for key, value in LLAMA.items() if key != "torch_dtype"}
    assert load_model_config(save(tmp_path, values)).dtype == ""
    assert load_model_config(save(tmp_path, {**values, "dtype": "float16"})).dtype == "float16"


def test_harmless_fields_are_accepted(tmp_path: Path) -> None:
    harmless = {
        "_name_or_path": "x",
        "transformers_version": "5.0.0",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "is_llama_config": True,
        "rope_interleaved": False,
        "use_cache": False,
        "partial_rotary_factor": 1.0,
        "some_future_switch": None,
    }
    assert load_model_config(save(tmp_path, {**LLAMA, **harmless})) == load_model_config(save(tmp_path, LLAMA))


@pytest.mark.parametrize(
    ("base", "fields", "named"),
    [
        (LLAMA, {"architectures": ["GPT2LMHeadModel"]}, "architectures"),
        (LLAMA, {"architectures": None}, "architectures"),
        (LLAMA, {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act"),
        (LLAMA, {"num_experts": 8}, "num_experts"),
        (LLAMA, {"num_local_experts": 8}, "num_local_experts"),
        (LLAMA, {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA, {"rope_interleaved": True}, "rope_interleaved"),
        (LLAMA, {"residual_multiplier": 0.22}, "residual_multiplier"),
        (LLAMA, {"sliding_window": 32}, "sliding_window"),
        (LLAMA, {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type"),
        (LLAMA, {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope_scaling.rope_type"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor"),
        (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope_scaling.factor"),
        (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": 2, "mscale": 1}}, "rope_scaling.mscale"),
        (LLAMA, {"rope_scaling": "linear"}, "rope_scaling"),
        (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor"),
        (LLAMA, {"rope_theta": "many"}, "rope_theta"),
        (LLAMA, {"hidden_size": None}, "hidden_size"),
        (LLAMA, {"hidden_size": 64.5}, "hidden_size"),
        (LLAMA, {"hidden_size": 65}, "num_attention_heads"),
        (LLAMA, {"head_dim": 7}, "head_dim"),
        (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads"),
        (LLAMA, {"num_hidden_layers": 0}, "num_hidden_layers"),
        (LLAMA, {"rms_norm_eps": -1}, "rms_norm_eps"),
        (LLAMA, {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        (LLAMA, {"torch_dtype": "float8"}, "torch_dtype"),
        (LLAMA, {"eos_token_id": "end"}, "eos_token_id"),
        (LLAMA, {"eos_token_id": 100}, "eos_token_id"),
        (MISTRAL, {"attention_bias": True}, "attention_bias"),
        (MISTRAL, {"sliding_window": 0}, "sliding_window"),
        (MISTRAL, {"layer_types": _TYPES}, "layer_types"),
        (QWEN2, {"layer_types": _TYPES}, "layer_types"),
        (QWEN2, {"use_sliding_window": True, "layer_types": ["sliding_attention"]}, "layer_types"),
        (QWEN2, {"use_sliding_window": True, "layer_types": ["linear_attention"] * 4}, "layer_types"),
        (QWEN2, {"use_sliding_window": True, "max_window_layers": None}, "max_window_layers"),
        (QWEN3, {"mlp_bias": True}, "mlp_bias"),
    ],
)
def test_refused_by_name(tmp_path: Path, base: dict[str, Any], fields: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_model_config(save(tmp_path, {**base, **fields}))
    assert caught.value.param == named
    assert str(tmp_path / "config.json") in caught.value.message
    assert named in caught.value.message


def test_a_window_that_is_not_stated_is_refused(tmp_path: Path) -> None:
    values = {key: value for key, value in MISTRAL.items() if key != "sliding_window"}
    with pytest.raises(CheckpointError, match="'sliding_window' is missing"):
        load_model_config(save(tmp_path, values))


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00"])
def test_a_file_that_is_no_object_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model_config(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        load_model_config(tmp_path)


def test_digest_is_of_what_the_weights_compute(tmp_path: Path) -> None:
    digest = load_model_config(save(tmp_path, LLAMA)).digest
    assert load_model_config(save(tmp_path, {**LLAMA, "eos_token_id": 7, "torch_dtype": "float32"})).digest == digest
    for changed in ({"rope_theta": 1e4}, {"rms_norm_eps": 1e-6}, {"num_key_value_heads": 4}, {"attention_bias": True}):
        assert load_model_config(save(tmp_path, {**LLAMA, **changed})).digest != digest

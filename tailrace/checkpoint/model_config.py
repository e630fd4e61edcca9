"""ModelConfig: what a Hugging Face `config.json` says, checked and normalized. No torch.

A field that would change what the model computes is either understood or refused by name; it is never ignored. Fields
are judged in this order: read here, known to be harmless, harmless by their value (null, false, empty), else refused.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tailrace.checkpoint.rope_config import RopeConfig, read_rope
from tailrace.errors import CheckpointError

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
DTYPES = ("bfloat16", "float16", "float32")
_DIGEST_BYTES = 16
_SLIDING, _FULL = "sliding_attention", "full_attention"

_READ = frozenset(
    {
        "architectures", "attention_bias", "bos_token_id", "dtype", "eos_token_id", "head_dim", "hidden_act",
        "hidden_size", "intermediate_size", "layer_types", "max_position_embeddings", "max_window_layers",
        "mlp_bias", "model_type", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
        "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "sliding_window",
        "tie_word_embeddings", "torch_dtype", "use_sliding_window", "vocab_size",
    }
)  # fmt: skip
# About training, sampling defaults, other tasks, other tools or the file itself: nothing that changes a forward pass.
_HARMLESS = frozenset(
    {
        "attention_dropout", "auto_map", "bad_words_ids", "begin_suppress_tokens", "chunk_size_feed_forward",
        "classifier_dropout", "diversity_penalty", "do_sample", "early_stopping",
        "encoder_no_repeat_ngram_size", "finetuning_task", "hidden_dropout", "id2label", "initializer_range",
        "is_llama_config", "label2id", "length_penalty", "max_length", "max_new_tokens", "min_length",
        "name_or_path", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
        "output_attentions", "output_hidden_states", "output_scores", "pad_token_id", "pretraining_tp",
        "problem_type", "repetition_penalty", "resid_pdrop", "return_dict", "sep_token_id", "suppress_tokens",
        "task_specific_params", "temperature", "tokenizer_class", "top_k", "top_p", "transformers.js_config",
        "typical_p", "use_cache", "z_loss_coefficient",
    }
)  # fmt: skip
_HARMLESS_PREFIXES = ("_", "unsloth")
_HARMLESS_SUFFIXES = ("_version",)
_NEUTRAL_VALUES: dict[str, tuple[object, ...]] = {
    "partial_rotary_factor": (1, 1.0),
    "attention_multiplier": (1, 1.0),
    "embedding_multiplier": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "residual_multiplier": (1, 1.0),
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only model. Counts are of the whole model, not of a rank."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    """Of the projection after attention."""
    mlp_bias: bool
    qk_norm: bool
    """RMS norm over each head of queries and keys, before the rotation."""
    window: int
    """Tokens that a windowed layer attends to, itself included; 0 where no layer is windowed."""
    windowed_layers: tuple[int, ...]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    """Those of config.json, then those that only generation_config.json names."""
    dtype: str
    """The checkpoint's own; "" where it names none."""

    @property
    def digest(self) -> str:
        """Hex, over all that decides what the weights compute; token ids and the stored dtype are not part of that."""
        fields = {
            name: value
            for name, value in asdict(self).items()
            if name not in ("bos_token_id", "eos_token_ids", "dtype")
        }
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest()


@dataclass(frozen=True, slots=True)
class _Family:
    """How one architecture reads the fields in which the families differ."""

    qkv_bias: Callable[["_Fields"], bool]
    output_bias: Callable[["_Fields"], bool]
    mlp_bias: Callable[["_Fields"], bool]
    windowed_layers: Callable[["_Fields", int], tuple[int, ...]]
    qk_norm: bool = False
    default_head_dim: int | None = None
    optional: frozenset[str] = frozenset()
    """Fields that this family reads beyond the common ones."""


class _Fields:
    """Typed look-ups in one JSON object; every refusal names the file and the field."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values

    def refused(self, name: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: field {name!r} {why}", param=name)

    def get(self, name: str) -> Any:
        return self.values.get(name)

    def count(self, name: str, default: int | None = None) -> int:
        value = self.get(name)
        value = default if value is None else value
        if value is None:
            raise self.refused(name, "is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refused(name, f"must be an integer of at least 1, not {value!r}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.refused(name, f"must be true or false, not {value!r}")
        return value

    def positive(self, name: str, default: float) -> float:
        value = self.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self.refused(name, f"must be a number above 0, not {value!r}")
        return float(value)

    def token_ids(self, name: str) -> tuple[int, ...]:
        value = self.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in ids):
            raise self.refused(name, f"must be a token id, a list of them or null, not {value!r}")
        return tuple(ids)


def load_model_config(directory: Path) -> ModelConfig:
    """Reads `config.json`, and the end tokens of `generation_config.json` where there is one.

    Raises CheckpointError, naming file and field, for a file that is missing or no JSON object, an architecture that is
    not served, and every field whose meaning Tailrace does not implement.
    """
    fields = _Fields(directory / CONFIG_FILE, _read_json(directory / CONFIG_FILE))
    architecture, family = _family_of(fields)
    _refuse_unsupported(fields, family)
    num_heads, num_layers = fields.count("num_attention_heads"), fields.count("num_hidden_layers")
    windowed = family.windowed_layers(fields, num_layers)
    config = ModelConfig(
        architecture=architecture,
        vocab_size=fields.count("vocab_size"),
        hidden_size=fields.count("hidden_size"),
        intermediate_size=fields.count("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.count("num_key_value_heads", default=num_heads),
        head_dim=fields.count("head_dim", default=family.default_head_dim or _split_head_dim(fields, num_heads)),
        rms_norm_eps=fields.positive("rms_norm_eps", default=1e-6),
        rope=read_rope(fields.values, fields.refused),
        max_position_embeddings=fields.count("max_position_embeddings"),
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        qkv_bias=family.qkv_bias(fields),
        output_bias=family.output_bias(fields),
        mlp_bias=family.mlp_bias(fields),
        qk_norm=family.qk_norm,
        window=fields.count("sliding_window") if windowed else 0,
        windowed_layers=windowed,
        bos_token_id=next(iter(fields.token_ids("bos_token_id")), None),
        eos_token_ids=_eos_token_ids(directory, fields),
        dtype=_dtype(fields),
    )
    _check_shapes(config, fields)
    return config


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return values


def _family_of(fields: _Fields) -> tuple[str, _Family]:
    names = fields.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise fields.refused("architectures", f"must be a list of one name, not {names!r}")
    if names[0] not in _FAMILIES:
        raise fields.refused("architectures", f"is {names[0]!r}; served are {', '.join(_FAMILIES)}")
    return names[0], _FAMILIES[names[0]]


def _refuse_unsupported(fields: _Fields, family: _Family) -> None:
    if fields.get("hidden_act") not in (None, "silu", "swish"):
        raise fields.refused("hidden_act", f"is {fields.get('hidden_act')!r}; only 'silu' is served")
    for name, value in fields.values.items():
        if name in _FAMILY_FIELDS and name not in family.optional:
            if value not in (None, False):
                raise fields.refused(name, f"= {value!r} is not part of this architecture as Tailrace serves it")
        elif not (_is_harmless(name) or _is_neutral(name, value)):
            raise fields.refused(name, f"= {_shortened(value)} is not supported")


def _is_harmless(name: str) -> bool:
    listed = name in _READ or name in _HARMLESS
    return listed or name.startswith(_HARMLESS_PREFIXES) or name.endswith(_HARMLESS_SUFFIXES)


def _is_neutral(name: str, value: object) -> bool:
    return value is None or value is False or value in ("", [], {}) or value in _NEUTRAL_VALUES.get(name, ())


def _shortened(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _split_head_dim(fields: _Fields, num_heads: int) -> int:
    if fields.get("head_dim") is None and fields.count("hidden_size") % num_heads:
        raise fields.refused(
            "num_attention_heads", f"= {num_heads} does not divide hidden_size, and head_dim is not given"
        )
    return max(1, fields.count("hidden_size") // num_heads)


def _eos_token_ids(directory: Path, fields: _Fields) -> tuple[int, ...]:
    ids = fields.token_ids("eos_token_id")
    path = directory / GENERATION_FILE
    if path.exists():
        ids += _Fields(path, _read_json(path)).token_ids("eos_token_id")
    return tuple(dict.fromkeys(ids))


def _dtype(fields: _Fields) -> str:
    name = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    value = fields.get(name)
    if value is None:
        return ""
    short = value.removeprefix("torch.") if isinstance(value, str) else value
    if short not in DTYPES:
        raise fields.refused(name, f"= {value!r} is not one of {', '.join(DTYPES)}")
    return str(short)


def _check_shapes(config: ModelConfig, fields: _Fields) -> None:
    if config.num_heads % config.num_kv_heads:
        raise fields.refused("num_key_value_heads", f"= {config.num_kv_heads} does not divide {config.num_heads} heads")
    if config.head_dim % 2:
        raise fields.refused("head_dim", f"= {config.head_dim} must be even: rotation works on pairs")
    beyond = [one for one in config.eos_token_ids if one >= config.vocab_size]
    if beyond:
        raise fields.refused("eos_token_id", f"names token {beyond[0]}, beyond vocab_size {config.vocab_size}")


def _always(value: bool) -> Callable[[_Fields], bool]:
    return lambda _fields: value


def _attention_bias(fields: _Fields) -> bool:
    return fields.flag("attention_bias", default=False)


def _mlp_bias(fields: _Fields) -> bool:
    return fields.flag("mlp_bias", default=False)


def _layer_types(fields: _Fields, num_layers: int) -> list[str] | None:
    types = fields.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != num_layers:
        raise fields.refused("layer_types", f"must list the type of each of the {num_layers} layers")
    unknown = [one for one in types if one not in (_SLIDING, _FULL)]
    if unknown:
        raise fields.refused("layer_types", f"names {unknown[0]!r}; served are {_FULL} and {_SLIDING}")
    return types


def _no_window(fields: _Fields, num_layers: int) -> tuple[int, ...]:
    if _SLIDING in (_layer_types(fields, num_layers) or ()):
        raise fields.refused("layer_types", f"names {_SLIDING}, but this architecture has no sliding window here")
    return ()


def _stated_window(fields: _Fields) -> Any:
    """A file without the field would get the reference implementation's default, which Tailrace does not guess."""
    if "sliding_window" not in fields.values:
        raise fields.refused("sliding_window", "is missing: must be a number of tokens, or null for none")
    return fields.get("sliding_window")


def _mistral_window(fields: _Fields, num_layers: int) -> tuple[int, ...]:
    """All layers or none: the architecture has one window for the whole model."""
    windowed = _stated_window(fields) is not None
    types = _layer_types(fields, num_layers)
    if types is not None and set(types) != {_SLIDING if windowed else _FULL}:
        raise fields.refused("layer_types", "does not agree with sliding_window, which holds for every layer")
    return tuple(range(num_layers)) if windowed else ()


def _qwen_window(fields: _Fields, num_layers: int) -> tuple[int, ...]:
    """Layers from max_window_layers on, or those that layer_types names; none unless use_sliding_window."""
    if not fields.flag("use_sliding_window", default=False) or _stated_window(fields) is None:
        return _no_window(fields, num_layers)
    types = _layer_types(fields, num_layers)
    if types is not None:
        return tuple(layer for layer, kind in enumerate(types) if kind == _SLIDING)
    first = fields.get("max_window_layers")
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise fields.refused(
            "max_window_layers", f"must be an integer of at least 0 with a sliding window, not {first!r}"
        )
    return tuple(range(first, num_layers))


_QWEN_WINDOW = frozenset({"use_sliding_window", "sliding_window", "max_window_layers"})
_FAMILY_FIELDS = _QWEN_WINDOW | {"attention_bias", "mlp_bias"}
_FAMILIES = {
    "LlamaForCausalLM": _Family(
        _attention_bias, _attention_bias, _mlp_bias, _no_window, optional=frozenset({"attention_bias", "mlp_bias"})
    ),
    "MistralForCausalLM": _Family(
        _always(False), _always(False), _always(False), _mistral_window, optional=frozenset({"sliding_window"})
    ),
    # max_window_layers and sliding_window without use_sliding_window mean nothing, in these families' own words.
    "Qwen2ForCausalLM": _Family(_always(True), _always(False), _always(False), _qwen_window, optional=_QWEN_WINDOW),
    "Qwen3ForCausalLM": _Family(
        _attention_bias,
        _attention_bias,
        _always(False),
        _qwen_window,
        qk_norm=True,
        default_head_dim=128,
        optional=_QWEN_WINDOW | {"attention_bias"},
    ),
}

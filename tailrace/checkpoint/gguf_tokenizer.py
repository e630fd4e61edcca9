"""tokenizer.json and tokenizer_config.json from the tokenizer that a GGUF file carries in its metadata."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tailrace.checkpoint.gguf_file import GgufFile
from tailrace.errors import CheckpointError

# GGUF's token types, of the GGUF specification (tokenizer.ggml.token_type).
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

_SPECIAL_TOKEN_KEYS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def _pre_tokenizer(name: str) -> Any:
    """How text is split before merging; the GGUF names the split, its rules are the model family's own."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if name == "gpt-2":
        return byte_level
    raise CheckpointError(f"unsupported GGUF pre-tokenizer {name!r} (tokenizer.ggml.pre); known: smollm, gpt-2")


def _byte_pair_model(file: GgufFile, tokens: list[str]) -> models.BPE:
    merges: list[tuple[str, str]] = []
    for merge in file.texts("tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        if not left or not right:
            raise CheckpointError(f"{file.path}: {merge!r} in tokenizer.ggml.merges is not a pair")
        merges.append((left, right))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.tokens holds a token twice")
    try:
        return models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, byte_fallback=False)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise CheckpointError(f"{file.path}: tokens and merges do not fit together: {error}") from error


def _added_tokens(file: GgufFile, tokens: list[str]) -> list[AddedToken]:
    types = file.integers("tokenizer.ggml.token_type")
    if len(types) != len(tokens):
        raise CheckpointError(
            f"{file.path}: {len(types)} entries in tokenizer.ggml.token_type for {len(tokens)} tokens"
        )
    unknown = set(types) - {_NORMAL, _CONTROL, _USER_DEFINED}
    if unknown:
        raise CheckpointError(f"{file.path}: unsupported token types {sorted(unknown)} in tokenizer.ggml.token_type")
    return [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind != _NORMAL
    ]


def build_tokenizer(file: GgufFile) -> Tokenizer:
    """The tokenizer of a GGUF file; CheckpointError names what is unsupported. Byte-level BPE ("gpt2") only.

    Added tokens keep the ids that the GGUF gives them. No token is put in front of or after a text: a GGUF that asks
    for that (add_bos_token, add_eos_token) is refused.
    """
    model = file.text("tokenizer.ggml.model")
    if model != "gpt2":
        raise CheckpointError(f"unsupported GGUF tokenizer {model!r} (tokenizer.ggml.model); known: gpt2")
    for key in ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token"):
        if file.integer(key, 0):
            raise CheckpointError(f"unsupported GGUF tokenizer: {key} is set")
    tokens = file.texts("tokenizer.ggml.tokens")
    tokenizer = Tokenizer(_byte_pair_model(file, tokens))
    tokenizer.pre_tokenizer = _pre_tokenizer(file.text("tokenizer.ggml.pre"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(_added_tokens(file, tokens))
    return tokenizer


def tokenizer_config(file: GgufFile, context_length: int) -> dict[str, object]:
    """What tokenizer_config.json says: the special tokens by role, and the chat template if there is one."""
    tokens = file.texts("tokenizer.ggml.tokens")
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    for role, key in _SPECIAL_TOKEN_KEYS.items():
        if key in file.keys:
            config[role] = tokens[file.integer(key)]
    if "tokenizer.chat_template" in file.keys:
        config["chat_template"] = file.text("tokenizer.chat_template")
    return config


def write_tokenizer(file: GgufFile, directory: Path, context_length: int) -> None:
    build_tokenizer(file).save(str(directory / "tokenizer.json"))
    text = json.dumps(tokenizer_config(file, context_length), indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

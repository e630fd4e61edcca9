"""The bundled model itself, fetched at first use: token ids known from the original model, template, a few words."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tailrace.checkpoint.resolve import resolve_model


@pytest.fixture(scope="module")
def directory() -> Path:
    return resolve_model("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
SYSTEM_IDS = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182]

GOLDEN = {
    # Published for the original tokenizer of HuggingFaceTB/SmolLM2-135M-Instruct.
    SYSTEM + "<|im_start|>user\nhello world<|im_end|>\n<|im_start|>assistant\n": [
        *(*SYSTEM_IDS, 2, 198, 1, 4093, 198, 28120, 905, 2, 198, 1, 520, 9531, 198),
    ],
    "What is the capital of France?": [1780, 314, 260, 3575, 282, 4649, 47],
    "Quelle est la capitale de la France ? Réponds en une phrase.": [
        *(65, 2726, 290, 1264, 2618, 47765, 1121, 367, 2618, 4649, 9148, 428, 2756, 96, 19870, 430, 16520, 8715, 30),
    ],
    # From a second implementation (byte-pair merging over the split that GGUF calls "smollm"), which agrees with ours
    # on thousands of random strings.
    "The year 2024, 3.14159": [504, 713, 216, 34, 32, 34, 36, 28, 216, 35, 30, 33, 36, 33, 37, 41],
    " 12345  spaces\n\n\ttab": [216, 33, 34, 35, 36, 37, 216, 5600, 1116, 197, 15999],
    "naïve café 中文 🙂 ½": [3546, 46494, 37366, 216, 28589, 29184, 47526, 216, 16738],
    "Let's don't I'LL  x": [4239, 506, 1326, 982, 339, 23, 16421, 216, 1792],
    "<|im_start|><|endoftext|> <repo_name>": [1, 0, 216, 3],
    "   ": [333],
    "": [],
}


@pytest.mark.parametrize("text", GOLDEN)
def test_token_ids_are_golden(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == GOLDEN[text]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_special_tokens_have_their_ids(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [0, 1, 2]
    assert tokenizer.get_vocab_size(with_added_tokens=True) == 49_152


def test_the_config_is_that_of_smollm2(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    assert [config[name] for name in sizes] == [30, 576, 9, 3, 64, 49_152]
    assert (config["rope_theta"], config["rms_norm_eps"], config["max_position_embeddings"]) == (1e5, 1e-5, 8192)
    assert config["tie_word_embeddings"] is True
    assert config["eos_token_id"] == 2


@pytest.mark.parity
def test_transformers_generates_sense_from_it(directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"

"""The tokenizer that `make demo` serves with, against transformers."""

import pytest
from transformers import AutoTokenizer

from services.gateway.detokenizer import Detokenizer
from services.gateway.tokenizer import Tokenizer
from tailrace.checkpoint.resolve import resolve_model

pytestmark = pytest.mark.parity
TEXTS = [
    "",
    "Hello, I'm 42!",
    "  two  spaces\n\n\ttab",
    "日本語のテキスト 👩‍👩‍👧 🎉",
    "def f(x):\n    return x**2  # é",
]


def test_smollm2_ids_and_text_equal_those_of_transformers() -> None:
    directory = resolve_model("smollm2-135m-instruct")
    tokenizer, reference = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
        for conversation in (messages, messages[1:]):
            expected = reference.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
            assert tokenizer.encode_chat(conversation) == expected
        ids = reference(text)["input_ids"]
        assert tokenizer.encode(text) == ids
        detokenizer = Detokenizer(tokenizer.vocabulary)
        assert "".join(map(detokenizer.feed, ids)) + detokenizer.flush() == reference.decode(ids) == text


def test_smollm2_content_forges_no_control_token() -> None:
    tokenizer = Tokenizer.load(resolve_model("smollm2-135m-instruct"))
    honest = [
        i for i in tokenizer.encode_chat([{"role": "user", "content": "a"}]) if i in tokenizer.vocabulary.special_ids
    ]
    content = "".join(tokenizer.vocabulary[i].decode() for i in sorted(tokenizer.vocabulary.special_ids))
    ids = tokenizer.encode_chat([{"role": "user", "content": content}])
    assert [i for i in ids if i in tokenizer.vocabulary.special_ids] == honest

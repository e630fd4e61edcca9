"""Text to token ids: plain prompts and conversations. In both, special tokens inside the client's text stay text."""

import asyncio
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import AddedToken
from tokenizers import Tokenizer as RawTokenizer

from services.gateway.chat_template import ChatTemplate
from services.gateway.vocabulary import Decoding, Vocabulary
from tailrace.errors import CheckpointError, InvalidRequestError, OverloadedError

_T = TypeVar("_T")
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A Hugging Face fast tokenizer with its chat template. Thread-safe."""

    def __init__(self, raw: RawTokenizer, config: Mapping[str, Any] | None = None, template: str | None = None) -> None:
        """`config`: tokenizer_config.json. `template`: overrides its chat_template.

        Raises CheckpointError for a decoder or template that cannot be served.
        """
        spec = json.loads(raw.to_str())
        self.vocabulary = Vocabulary(raw, Decoding.parse(spec["decoder"]))
        self.max_token_bytes = max(len(token.encode()) for token in raw.get_vocab())
        aliases, self._alias_ids = _add_aliases(raw)
        raw.encode_special_tokens = True
        raw.no_truncation()
        raw.no_padding()
        self._raw = raw
        source = template if template is not None else _default_template((config or {}).get("chat_template"))
        self._template = source and ChatTemplate(source, aliases=aliases, variables=_special_tokens(config or {}))

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """From tokenizer.json, tokenizer_config.json and chat_template.jinja; only the first must be there."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{directory} has no tokenizer.json", param="model")
        try:
            raw = RawTokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{path} is not a tokenizer: {error}", param="model") from error
        template = directory / "chat_template.jinja"
        source = template.read_text(encoding="utf-8") if template.is_file() else None
        return cls(raw, _read_config(directory / "tokenizer_config.json"), source)

    def encode(self, text: str) -> list[int]:
        """A plain prompt, with the tokens that the tokenizer puts around one (BOS)."""
        return self._ids(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any] | None = None) -> list[int]:
        """A conversation, through the chat template. Raises InvalidRequestError when that refuses, or there is none."""
        if not self._template:
            raise InvalidRequestError("this model has no chat template; use /v1/completions", param="messages")
        text = self._template.render(messages, options)
        ids = self._ids(text, add_special_tokens=False)
        return [self._alias_ids.get(i, i) for i in ids]

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # The library's `encode` holds the interpreter's lock to its end; this lets the event loop go on meanwhile.
        return self._raw.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids


def _add_aliases(raw: RawTokenizer) -> tuple[dict[str, str], dict[int, int]]:
    """Another name for each special token, which no client can guess: (token -> alias, id of the alias -> its id)."""
    nonce = secrets.token_hex(16)
    special = {i: token for i, token in raw.get_added_tokens_decoder().items() if token.special}
    aliases = {token.content: f"\ufdd0{nonce}.{i}\ufdd1" for i, token in special.items()}
    raw.add_tokens([_alias(token, aliases[token.content]) for token in special.values()])
    return aliases, {_id_of(raw, aliases[token.content]): i for i, token in special.items()}


def _alias(token: AddedToken, name: str) -> AddedToken:
    return AddedToken(
        name, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False, special=False
    )


def _id_of(raw: RawTokenizer, token: str) -> int:
    token_id = raw.token_to_id(token)
    assert token_id is not None
    return token_id


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}", param="model") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object", param="model")
    return config


def _default_template(value: Any) -> str | None:
    """A string, or a list of named ones, of which "default" is meant."""
    if isinstance(value, list):
        return next((entry["template"] for entry in value if entry.get("name") == "default"), None)
    if value is None or isinstance(value, str):
        return value
    raise CheckpointError("tokenizer_config.json: chat_template is neither a string nor a list", param="chat_template")


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Each is a string, or an object with the string as its content."""
    tokens = {name: config.get(name) for name in _SPECIAL_NAMES}
    contents = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    return {name: content for name, content in contents.items() if isinstance(content, str)}


class TokenizerPool:
    """Runs tokenizers off the event loop, a few at a time, with a bound on those that wait."""

    def __init__(self, *, num_threads: int = 2, max_waiting: int = 256) -> None:
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenizer")
        self._max_waiting = max_waiting
        self._waiting = 0

    async def run(self, function: Callable[[], _T]) -> _T:
        """Raises OverloadedError when too many wait already."""
        if self._waiting >= self._max_waiting:
            raise OverloadedError("too many prompts wait to be tokenized", retry_after_s=1.0)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, function)
        finally:
            self._waiting -= 1

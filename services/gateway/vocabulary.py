"""The bytes behind each token id, read off the decoder that tokenizer.json names.

Working with bytes makes incremental detokenization exact and O(1) a token: a UTF-8 decoder holds back what is not a
character yet, and no window of tokens has to be decoded again.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as RawTokenizer

from tailrace.errors import CheckpointError

_SPACE_MARK = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class Decoding:
    """How token strings become bytes.

    `byte_level`: each character stands for a byte (GPT-2's table). Otherwise a mark stands for a space, and with
    `byte_fallback` tokens such as <0xE2> are single bytes. `strips_space`: a text does not begin with its first space.
    """

    byte_level: bool
    byte_fallback: bool = False
    strips_space: bool = False

    @classmethod
    def parse(cls, spec: Mapping[str, Any] | None) -> "Decoding":
        """From the `decoder` of tokenizer.json. Raises CheckpointError for a kind that is not known here."""
        kinds = _flatten(spec)
        if "ByteLevel" in kinds:
            return cls(byte_level=True)
        return cls(False, "ByteFallback" in kinds, bool(kinds & {"Strip", "Metaspace"}))


def _flatten(spec: Mapping[str, Any] | None) -> set[str]:
    parts: list[dict[str, Any]] = [dict(part) for part in (spec or {}).get("decoders", [spec or {}])]
    for part in parts:
        if not _is_known(part):
            raise CheckpointError(f"tokenizer.json: the decoder {part!r} is not supported", param="decoder")
    if not {part["type"] for part in parts} & {"ByteLevel", "Replace", "Metaspace"}:
        raise CheckpointError("tokenizer.json: the decoder does not say how spaces are written", param="decoder")
    return {part["type"] for part in parts if part.get("prepend_scheme") != "never"}


def _is_known(part: Mapping[str, Any]) -> bool:
    match part.get("type"):
        case "ByteLevel" | "ByteFallback" | "Fuse":
            return True
        case "Replace":
            return (part["pattern"], part["content"]) == ({"String": _SPACE_MARK}, " ")
        case "Strip":
            return (part["content"], part["start"], part["stop"]) == (" ", 1, 0)
        case "Metaspace":
            return str(part["replacement"]) == _SPACE_MARK
    return False


def _byte_level_table() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 stands for itself, the other bytes for characters from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class Vocabulary(dict[int, bytes]):
    """token id -> bytes, filled at first use. Ids that the tokenizer does not know (padding rows) have none."""

    def __init__(self, raw: RawTokenizer, decoding: Decoding) -> None:
        super().__init__()
        self.decoding = decoding
        self._tokens = {i: token for token, i in raw.get_vocab(with_added_tokens=True).items()}
        self._table = _byte_level_table()
        self.num_tokens = max(self._tokens, default=-1) + 1
        """Ids are below it."""
        self.texts = Texts(self)
        self.special_ids = frozenset(i for i, token in raw.get_added_tokens_decoder().items() if token.special)

    def __missing__(self, token_id: int) -> bytes:
        token = self._tokens.get(token_id)
        value = b"" if token is None else self._bytes(token)
        self[token_id] = value
        return value

    def text(self, token_id: int) -> str | None:
        """As `texts`, but nothing is kept."""
        token = self._tokens.get(token_id)
        return _text(b"" if token is None else self._bytes(token))

    def _bytes(self, token: str) -> bytes:
        if self.decoding.byte_level:
            if all(character in self._table for character in token):
                return bytes(self._table[character] for character in token)
            return token.encode()
        if self.decoding.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes((int(match[1], 16),))
        return token.replace(_SPACE_MARK, " ").encode()


class Texts(dict[int, str | None]):
    """token id -> its text where its bytes are whole characters, else None; filled at first use."""

    def __init__(self, vocabulary: Mapping[int, bytes]) -> None:
        super().__init__()
        self._vocabulary = vocabulary

    def __missing__(self, token_id: int) -> str | None:
        text = _text(self._vocabulary[token_id])
        self[token_id] = text
        return text


def _text(token: bytes) -> str | None:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return None

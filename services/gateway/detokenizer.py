"""Tokens in, text out, never half a character."""

import codecs
from collections.abc import Sequence

from services.gateway.vocabulary import Vocabulary

_MAX_CHARACTER_TOKENS = 4
_NO_IDS: frozenset[int] = frozenset()


class Detokenizer:
    """Incremental detokenizer of one choice.

    What all calls return, joined, is the text of all tokens decoded at once; bytes that are not UTF-8 become U+FFFD
    as soon as that is certain. (SentencePiece: a run of byte tokens that is not UTF-8 keeps its valid characters.)
    """

    __slots__ = ("_hidden", "_is_mid_character", "_strips_space", "_texts", "_utf8", "_vocabulary")

    def __init__(self, vocabulary: Vocabulary, *, skip_special: bool = True, after: Sequence[int] = ()) -> None:
        """`after`: the tokens that the text continues; empty for a text of its own."""
        self._vocabulary = vocabulary
        self._hidden = vocabulary.special_ids if skip_special else _NO_IDS
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strips_space = vocabulary.decoding.strips_space and not any(map(self._token_bytes, after))
        self._utf8.decode(b"".join(map(self._token_bytes, after[-_MAX_CHARACTER_TOKENS:])))
        self._texts = vocabulary.texts
        self._is_mid_character = self._has_bytes_left()

    def feed(self, token_id: int) -> str:
        text = None if self._is_mid_character else self._texts[token_id]
        if text is None:
            text = self._utf8.decode(self._token_bytes(token_id))
            self._is_mid_character = self._has_bytes_left()
        elif token_id in self._hidden:
            return ""
        return self._printable(text) if self._strips_space else text

    @property
    def is_plain(self) -> bool:
        """A token that is not special and whole text is returned as it is, and changes nothing here."""
        return not (self._is_mid_character or self._strips_space)

    def flush(self) -> str:
        """At the end of the choice: what is left of a character that never became whole."""
        return self._printable(self._utf8.decode(b"", final=True))

    def _has_bytes_left(self) -> bool:
        return bool(self._utf8.getstate()[0])

    def _token_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self._hidden else self._vocabulary[token_id]

    def _printable(self, text: str) -> str:
        if self._strips_space and text:
            self._strips_space = False
            return text.removeprefix(" ")
        return text


def decode(vocabulary: Vocabulary, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
    detokenizer = Detokenizer(vocabulary, skip_special=skip_special)
    return "".join(map(detokenizer.feed, token_ids)) + detokenizer.flush()

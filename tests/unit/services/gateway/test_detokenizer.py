import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders

from services.gateway.detokenizer import Detokenizer, decode
from services.gateway.tokenizer import Tokenizer
from services.gateway.vocabulary import Decoding, Vocabulary
from tailrace.errors import CheckpointError
from tests.helpers.tiny_tokenizers import byte_level, sentence_piece

BYTE_LEVEL = byte_level()
PIECES = sentence_piece()
BYTES = Vocabulary(BYTE_LEVEL, Decoding(byte_level=True))
MARKS = Vocabulary(PIECES, Decoding(byte_level=False, byte_fallback=True, strips_space=True))


def deltas(vocabulary: Vocabulary, ids: list[int], **options: object) -> list[str]:
    detokenizer = Detokenizer(vocabulary, **options)  # type: ignore[arg-type]
    return [*map(detokenizer.feed, ids), detokenizer.flush()]


@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=40), st.booleans())
def test_deltas_of_any_tokens_join_to_the_full_decode(ids: list[int], skip: bool) -> None:
    expected = BYTE_LEVEL.decode(ids, skip_special_tokens=skip)
    assert "".join(deltas(BYTES, ids, skip_special=skip)) == expected


@given(st.text(max_size=60))
def test_no_character_of_any_text_is_split(text: str) -> None:
    parts = deltas(BYTES, BYTE_LEVEL.encode(text).ids, skip_special=False)
    assert "".join(parts) == text
    assert "".join(parts).count("\ufffd") == text.count("\ufffd")
    assert parts[-1] == ""  # nothing was held back


@given(st.text(max_size=60))
def test_sentence_piece_text_is_that_of_the_full_decode(text: str) -> None:
    ids = PIECES.encode(text, add_special_tokens=False).ids
    assert "".join(deltas(MARKS, ids)) == PIECES.decode(ids)


@given(st.text(alphabet="the cat\u00e9\u65e5", min_size=1, max_size=30), st.integers(0, 30))
def test_a_continuation_is_what_the_full_decode_has_beyond_the_prompt(text: str, cut: int) -> None:
    ids = PIECES.encode(text, add_special_tokens=False).ids
    prompt, rest = ids[:cut], ids[cut:]
    if "\ufffd" in PIECES.decode(prompt):
        return  # the prompt ends inside a character
    assert PIECES.decode(prompt) + "".join(deltas(MARKS, rest, after=prompt)) == PIECES.decode(ids)


def test_an_emoji_of_several_tokens_comes_whole() -> None:
    ids = [BYTE_LEVEL.token_to_id(token) for token in BYTE_LEVEL.encode("🎈").tokens]
    assert len(ids) > 1
    assert deltas(BYTES, ids) == [""] * (len(ids) - 1) + ["🎈", ""]


def test_an_unfinished_character_shows_at_the_end() -> None:
    assert deltas(BYTES, BYTE_LEVEL.encode("🎈").ids[:-1])[-1] == "\ufffd"


def test_a_character_that_the_prompt_began_is_finished() -> None:
    ids = BYTE_LEVEL.encode("🎈").ids
    assert "".join(deltas(BYTES, ids[-1:], after=ids[:-1])) == "🎈"


def test_a_run_of_byte_tokens_keeps_its_valid_characters() -> None:
    ids = [3 + byte for byte in "€".encode()] + [3 + 0xFF]
    assert "".join(deltas(MARKS, ids)) == "€\ufffd"


def test_a_leading_space_belongs_to_a_continuation_only() -> None:
    the = PIECES.token_to_id("\u2581the")
    assert decode(MARKS, [the, the]) == "the the"
    assert "".join(deltas(MARKS, [the], after=[the])) == " the"
    assert "".join(deltas(MARKS, [the], after=[1])) == "the"  # a BOS shows nothing


def test_ids_that_the_tokenizer_does_not_know_show_nothing() -> None:
    assert decode(BYTES, [100_000, *BYTE_LEVEL.encode("a").ids, -1]) == "a"


def test_aliases_of_control_tokens_never_show() -> None:
    raw = byte_level()
    tokenizer = Tokenizer(raw)
    ids = range(BYTE_LEVEL.get_vocab_size(), raw.get_vocab_size())
    assert len(ids) == 3
    assert decode(tokenizer.vocabulary, list(ids), skip_special=False) == ""


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.Replace("_", " "), decoders.Fuse()])
def test_an_unknown_decoder_is_refused(decoder: decoders.Decoder | None) -> None:
    raw = RawTokenizer.from_str(BYTE_LEVEL.to_str())
    raw.decoder = decoder
    with pytest.raises(CheckpointError, match="decoder"):
        Tokenizer(raw)


@pytest.mark.parametrize(("scheme", "text"), [("always", "the the"), ("first", "the the"), ("never", " the the")])
def test_metaspace_strips_the_space_that_it_put(scheme: str, text: str) -> None:
    raw = sentence_piece()
    raw.decoder = decoders.Metaspace(prepend_scheme=scheme)
    ids = [raw.token_to_id("\u2581the")] * 2
    assert decode(Tokenizer(raw).vocabulary, ids) == text == raw.decode(ids)

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.kv import chain_memo
from tailrace.kv.chain_memo import PIECE_BLOCKS, ChainMemo
from tailrace.kv.hashing import TOKEN_BYTES, hash_blocks

PIECE = 2 * PIECE_BLOCKS
"""Tokens in blocks of 2."""


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 3 * PIECE), st.integers(0, 200), st.sampled_from([b"a", b"b"])),
        max_size=12,
    ),
    st.integers(1, 4),
)
def test_hashes_are_those_that_would_be_computed(prompts: list[tuple[int, int, int, bytes]], max_pieces: int) -> None:
    memo = ChainMemo(max_pieces * PIECE)
    for first, shared, more, seed in prompts:
        tokens = [first] * shared + list(range(more))
        assert memo.hash_blocks(tokens, 2, seed) == hash_blocks(tokens, 2, seed)
        assert memo._num_bytes == sum(len(piece) for _, piece in memo._pieces) <= max_pieces * PIECE * TOKEN_BYTES


def test_a_known_beginning_is_not_hashed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []
    real = chain_memo.hash_encoded

    def count(data: bytes, block_size: int, parent: bytes) -> list[bytes]:
        hashed.append(len(data) // TOKEN_BYTES)
        return real(data, block_size, parent)

    monkeypatch.setattr(chain_memo, "hash_encoded", count)
    memo = ChainMemo()
    tokens = list(range(3 * PIECE + 10))
    memo.hash_blocks(tokens, 2, b"seed")
    assert sum(hashed) == len(tokens)
    hashed.clear()
    memo.hash_blocks([*tokens, 1, 2], 2, b"seed")
    assert sum(hashed) == 12
    hashed.clear()
    memo.hash_blocks(tokens, 2, b"another salt")
    assert sum(hashed) == len(tokens)


def test_impossible_values_are_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        ChainMemo(0)
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        ChainMemo().hash_blocks([1], 0, b"")
    for tokens in ([-1], [2**32], ["x"], [1.5]):
        with pytest.raises(ValueError, match="token ids must be integers"):
            ChainMemo().hash_blocks(tokens, 1, b"")  # type: ignore[arg-type]

"""The compiled hashing of prompts gives what the plain one gives, and refuses what that refuses."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace import compiler
from tailrace.checkpoint.cache_dir import default_cache_dir
from tailrace.kv.chain_memo import ChainMemo
from tailrace.kv.chains import NativeChains, open_chains
from tailrace.kv.hashing import chain_seed, hash_blocks

FINGERPRINT = bytes(range(16))
SEED = chain_seed(FINGERPRINT)
CHAINS = NativeChains(default_cache_dir())


def test_golden_chains() -> None:
    """As in test_hashing.py."""
    hashes = CHAINS.hash_blocks(list(range(1000, 1011)), 4, SEED)
    assert [block_hash.hex() for block_hash in hashes] == [
        "a105eb7bf01c60ffd2ec19d4620e6523",
        "af6ef0d43a0a64e2d7486d33b48a1431",
    ]
    (block_hash,) = CHAINS.hash_blocks([0, 1, 2**31, 2**32 - 1], 4, SEED)
    assert block_hash.hex() == "680f4878f92417af8e76d383095205c6"


@given(st.lists(st.integers(0, 2**32 - 1), max_size=200), st.integers(1, 100), st.binary(min_size=16, max_size=16))
def test_hashes_are_those_of_the_plain_function(tokens: list[int], block_size: int, seed: bytes) -> None:
    """A message is 20 to 416 bytes: one piece of BLAKE2b's 128 bytes, exactly one, and several."""
    assert CHAINS.hash_blocks(tokens, block_size, seed) == hash_blocks(tokens, block_size, seed)


@pytest.mark.parametrize("block_size", [27, 28, 29, 59, 60, 61])
def test_messages_that_end_with_a_piece(block_size: int) -> None:
    tokens = list(range(2**31, 2**31 + 3 * block_size + 1))
    assert CHAINS.hash_blocks(tokens, block_size, SEED) == hash_blocks(tokens, block_size, SEED)


def test_tokens_that_are_no_list_of_integers_are_read_as_the_plain_function_reads_them() -> None:
    class Index:
        def __index__(self) -> int:
            return 7

    for tokens in (range(9), tuple(range(9)), [True] * 9, [Index()] * 9, []):
        assert CHAINS.hash_blocks(tokens, 2, SEED) == hash_blocks(tokens, 2, SEED)


@pytest.mark.parametrize("token", [-1, 2**32, 2**64, "a", None, 1.5])
@pytest.mark.parametrize("place", [0, 5])
def test_tokens_outside_uint32_are_refused(token: int, place: int) -> None:
    tokens = list(range(8))
    tokens[place] = token
    with pytest.raises(ValueError, match="token ids must be integers"):
        CHAINS.hash_blocks(tokens, 4, SEED)


def test_impossible_values_are_refused() -> None:
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        CHAINS.hash_blocks([1], 0, SEED)
    with pytest.raises(ValueError, match="seed must have 16 bytes, not 4"):
        CHAINS.hash_blocks([1], 1, b"seed")


def test_it_is_compiled_where_it_can_be() -> None:
    assert isinstance(open_chains(default_cache_dir()), NativeChains)


def test_without_a_compiler_chains_are_hashed_in_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiler, "_COMPILERS", ())
    chains = open_chains(tmp_path)
    assert isinstance(chains, ChainMemo)
    assert "hashed in Python" in caplog.text
    assert "install gcc or clang" in caplog.text
    assert chains.hash_blocks(list(range(9)), 4, SEED) == CHAINS.hash_blocks(list(range(9)), 4, SEED)

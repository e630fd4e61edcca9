"""Golden values were computed once from the formula, apart from this code: stored blocks outlive versions."""

from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.kv.hashing import chain_seed, hash_blocks, tenant_name

FINGERPRINT = bytes(range(16))
TOKENS = list(range(1000, 1011))


def test_golden_seeds() -> None:
    assert chain_seed(FINGERPRINT).hex() == "799395a5c47e7bad8a2a725ead612592"
    assert chain_seed(FINGERPRINT, "adapter").hex() == "eb3f711677669a5d716bd474a8b27627"
    assert chain_seed(FINGERPRINT, "adapter", "sält").hex() == "f2d4aaefd888dad189077089e8545399"


def test_golden_chain() -> None:
    hashes = hash_blocks(TOKENS, 4, chain_seed(FINGERPRINT))
    assert [block_hash.hex() for block_hash in hashes] == [
        "a105eb7bf01c60ffd2ec19d4620e6523",
        "af6ef0d43a0a64e2d7486d33b48a1431",
    ]


def test_golden_chain_of_extreme_tokens() -> None:
    (block_hash,) = hash_blocks([0, 1, 2**31, 2**32 - 1], 4, chain_seed(FINGERPRINT))
    assert block_hash.hex() == "680f4878f92417af8e76d383095205c6"


def test_the_formula() -> None:
    first, second = hash_blocks([1, 2, 3, 4], 2, b"seed")
    assert first == blake2b(b"seed" + bytes([1, 0, 0, 0, 2, 0, 0, 0]), digest_size=16).digest()
    assert second == blake2b(first + bytes([3, 0, 0, 0, 4, 0, 0, 0]), digest_size=16).digest()


@pytest.mark.parametrize(
    "other",
    [
        (bytes(16), "", ""),
        (FINGERPRINT, "adapter", ""),
        (FINGERPRINT, "", "adapter"),
        (FINGERPRINT, "", "salt"),
        (FINGERPRINT + b"a", "", ""),
    ],
)
def test_layout_adapter_and_salt_give_chains_with_nothing_in_common(other: tuple[bytes, str, str]) -> None:
    plain = hash_blocks(TOKENS, 4, chain_seed(FINGERPRINT))
    assert not set(plain) & set(hash_blocks(TOKENS, 4, chain_seed(*other)))


def test_parts_of_the_seed_do_not_run_together() -> None:
    assert chain_seed(b"", "ab", "c") != chain_seed(b"", "a", "bc")


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.integers(1, 9), st.integers(0, 40))
def test_prefix_closure(tokens: list[int], block_size: int, cut: int) -> None:
    seed = chain_seed(FINGERPRINT)
    whole = hash_blocks(tokens, block_size, seed)
    assert len(whole) == len(tokens) // block_size
    assert len(set(whole)) == len(whole)
    prefix = hash_blocks(tokens[:cut], block_size, seed)
    assert prefix == whole[: len(prefix)]


@given(st.lists(st.integers(0, 99), min_size=8, max_size=40), st.integers(0, 7))
def test_one_changed_token_changes_its_block_and_all_after_it(tokens: list[int], at: int) -> None:
    changed = [*tokens[:at], tokens[at] + 1, *tokens[at + 1 :]]
    before, after = (hash_blocks(each, 4, b"seed") for each in (tokens, changed))
    assert [a == b for a, b in zip(before, after, strict=True)] == [index < at // 4 for index in range(len(before))]


@pytest.mark.parametrize("first", [0, 1, 2])
def test_extending_a_chain_gives_its_rest(first: int) -> None:
    whole = hash_blocks(TOKENS, 4, b"seed")
    parent = whole[first - 1] if first else None
    assert hash_blocks(TOKENS, 4, b"seed", first=first, parent=parent) == whole[first:]


def test_nothing_to_extend_is_no_blocks() -> None:
    assert hash_blocks(TOKENS, 4, b"seed", first=5, parent=b"parent") == []


@pytest.mark.parametrize(("first", "parent"), [(1, None), (0, b"parent"), (-1, b"parent")])
def test_first_and_parent_go_together(first: int, parent: bytes | None) -> None:
    with pytest.raises(ValueError, match="parent"):
        hash_blocks(TOKENS, 4, b"seed", first=first, parent=parent)


@pytest.mark.parametrize("token", [-1, 2**32, "a"])
def test_tokens_outside_uint32_are_refused(token: int) -> None:
    with pytest.raises(ValueError, match="token ids"):
        hash_blocks([token], 1, b"seed")


def test_a_tenant_s_name_is_the_one_that_b2sum_prints() -> None:
    """`printf %s salt | b2sum -l 64`. What a store has on disk bears these names."""
    assert tenant_name("") == ""
    assert tenant_name("salt") == "2e3b6ab7edb43725"
    assert tenant_name("s\u00e4lt") == "a8b200a5b8936e84"
    assert len(tenant_name("s" * 1024)) == 16

"""Names of blocks, by content. One function for every service.

A block's hash covers all tokens before it, so equal hashes mean equal prefixes:
h_i = BLAKE2b-128(h_{i-1} || tokens_i), tokens as little-endian uint32, h_{-1} = `chain_seed`.
"""

import struct
import sys
from array import array
from collections.abc import Sequence
from hashlib import blake2b

HASH_BYTES = 16
TOKEN_BYTES = 4
MAX_SALT_LENGTH = 1024
"""Characters of a cache salt."""
_NAME_BYTES = 8


def chain_seed(fingerprint: bytes, adapter: str = "", cache_salt: str = "") -> bytes:
    """Where chains begin: requests that differ in layout, adapter or salt never share a hash.

    Each part is preceded by its length, so that no two different triples have the same encoding.
    """
    digest = blake2b(digest_size=HASH_BYTES)
    for part in (fingerprint, adapter.encode(), cache_salt.encode()):
        digest.update(struct.pack("<I", len(part)))
        digest.update(part)
    return digest.digest()


def tenant_name(cache_salt: str) -> str:
    """What a store calls those whose requests have this salt: 16 hexadecimal digits; empty without a salt.

    BLAKE2b-64 of its UTF-8, which `printf %s SALT | b2sum -l 64` prints as well. A salt may be as good as a password to
    what is cached under it, so it goes no further than to whoever computes hashes.
    """
    if not cache_salt:
        return ""
    return blake2b(cache_salt.encode(), digest_size=_NAME_BYTES).hexdigest()


def hash_blocks(
    tokens: Sequence[int], block_size: int, seed: bytes, *, first: int = 0, parent: bytes | None = None
) -> list[bytes]:
    """Hashes of the full blocks of `tokens` from block `first` on; a partial last block has none.

    `tokens` always starts at position 0. To extend a chain, pass `first` > 0 and, as `parent`, the hash before it.
    Raises ValueError for token ids outside uint32, and for `first` and `parent` that do not go together.
    """
    if block_size < 1 or first < 0 or (first > 0) != (parent is not None):
        raise ValueError(f"block_size={block_size} first={first}: a parent belongs to first > 0 and only to it")
    return extend_hashes(tokens[first * block_size :], block_size, seed if parent is None else parent)


def extend_hashes(tokens: Sequence[int], block_size: int, parent: bytes) -> list[bytes]:
    """Hashes of the full blocks of `tokens`, which follow the block with hash `parent`: at the start, the seed."""
    return hash_encoded(encode_tokens(tokens, len(tokens) // block_size * block_size), block_size, parent)


def hash_encoded(data: bytes, block_size: int, parent: bytes) -> list[bytes]:
    """As `extend_hashes`, of tokens that `encode_tokens` has encoded: a whole number of blocks."""
    width = block_size * TOKEN_BYTES
    hashes: list[bytes] = []
    for start in range(0, len(data), width):
        parent = blake2b(parent + data[start : start + width], digest_size=HASH_BYTES).digest()
        hashes.append(parent)
    return hashes


def parent_of(hashes: Sequence[bytes], index: int) -> bytes:
    """The hash of the block before this one of a chain; empty before the first."""
    return hashes[index - 1] if index else b""


def encode_tokens(tokens: Sequence[int], count: int) -> bytes:
    """The first `count` tokens as little-endian uint32. Raises ValueError for token ids outside uint32."""
    try:
        encoded = array("I", tokens if count == len(tokens) else tokens[:count])
    except (OverflowError, TypeError) as error:
        raise ValueError("token ids must be integers from 0 to 2**32 - 1") from error
    if sys.byteorder == "big":
        encoded.byteswap()
    return encoded.tobytes()

"""Block hashes that are known already: conversations, and prompts with the same beginning, repeat their chains."""

from collections import OrderedDict
from collections.abc import Sequence

from tailrace.kv.hashing import TOKEN_BYTES, encode_tokens, hash_encoded

PIECE_BLOCKS = 32
"""Hashed and remembered together."""
MAX_PIECE_TOKENS = 1 << 22
"""Remembered in all: a token costs some 8 bytes in blocks of 16."""


class ChainMemo:
    """`hash_blocks`, for prompts whose beginning was hashed before at the price of looking it up.

    A piece is known by the hash before it and by all of its tokens, so that what is found is what would be computed,
    and chains of different salts share nothing. Those used last are kept. Used by one thread.
    """

    def __init__(self, max_tokens: int = MAX_PIECE_TOKENS) -> None:
        """Raises ValueError for a `max_tokens` below 1."""
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
        self._max_bytes = max_tokens * TOKEN_BYTES
        self._num_bytes = 0
        self._pieces: OrderedDict[tuple[bytes, bytes], list[bytes]] = OrderedDict()

    def hash_blocks(self, tokens: Sequence[int], block_size: int, seed: bytes) -> list[bytes]:
        """Hashes of the full blocks of `tokens`. Raises ValueError for token ids outside uint32.

        `block_size` must be the same for all chains of one seed, as it is where the seed covers the layout.
        """
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {block_size}")
        data = encode_tokens(tokens, len(tokens) // block_size * block_size)
        width = PIECE_BLOCKS * block_size * TOKEN_BYTES
        num_whole = len(data) // width * width
        pieces, parent = self._pieces, seed
        hashes: list[bytes] = []
        for start in range(0, num_whole, width):
            key = (parent, data[start : start + width])
            known = pieces.get(key)
            if known is None:
                known = pieces[key] = hash_encoded(key[1], block_size, parent)
                self._num_bytes += width
            else:
                pieces.move_to_end(key)
            hashes += known
            parent = known[-1]
        while self._num_bytes > self._max_bytes:
            (_, piece), _ = pieces.popitem(last=False)
            self._num_bytes -= len(piece)
        return hashes + hash_encoded(data[num_whole:], block_size, parent)

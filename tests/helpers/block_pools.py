"""Block pools with blocks in a state that a test begins with."""

from tailrace.kv.block_pool import BlockPool

EPOCH = 7


def make_pool(num_blocks: int = 8) -> BlockPool:
    return BlockPool(num_blocks, epoch=EPOCH)


def hashes_of(name: str, count: int) -> list[bytes]:
    return [f"{name}{index}".encode() for index in range(count)]


def write_sequence(pool: BlockPool, name: str, count: int) -> list[int]:
    """A sequence of `count` full blocks that this worker computed and still holds."""
    blocks = pool.allocate(count)
    assert blocks is not None
    for block, block_hash in zip(blocks, hashes_of(name, count), strict=True):
        pool.register(block, block_hash)
    return blocks


def cache_sequence(pool: BlockPool, name: str, count: int) -> list[int]:
    blocks = write_sequence(pool, name, count)
    pool.release(blocks)
    return blocks


def allocated(pool: BlockPool, count: int) -> list[int]:
    blocks = pool.allocate(count)
    assert blocks is not None
    return blocks


def landing(pool: BlockPool, count: int) -> list[int]:
    blocks = pool.allocate_landing(count)
    assert blocks is not None
    return blocks


def evicted(pool: BlockPool, count: int) -> list[int]:
    """Blocks that `allocate` takes from the cache, once nothing is free."""
    return allocated(pool, count)

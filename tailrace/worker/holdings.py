"""What the ledger says of blocks that no request answers for."""

from collections.abc import Collection

from tailrace.kv.block_pool import BlockPool, BlockState
from tailrace.messages import Holding, HoldingState

_STATES = ((BlockState.LANDING, HoldingState.LANDING), (BlockState.QUARANTINED, HoldingState.QUARANTINED))


def pending_reads(pool: BlockPool, named: Collection[int]) -> list[Holding]:
    """What is still read into for a request that is gone. `named`: blocks of requests that are not."""
    found = []
    for state, name in _STATES:
        blocks = (block for block in range(pool.num_blocks) if block not in named and pool.state(block) is state)
        if orphans := tuple(blocks):
            found.append(Holding("a pending read", name, orphans, 0.0))
    return found

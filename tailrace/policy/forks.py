"""A prompt that has drawn forks into its choices: full blocks shared, the partial last one copied."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from tailrace.kv.block_pool import BlockPool
from tailrace.policy.copies import PendingCopies
from tailrace.policy.request import DrawnToken
from tailrace.policy.sequence import DecodeStep, Sequence


@dataclass(frozen=True, slots=True)
class Branches:
    held: list[Sequence] = field(default_factory=list)
    """They have their blocks; the first one has its parent's."""
    homeless: list[Sequence] = field(default_factory=list)
    """There was no block for them: they are computed again later."""


def branch(
    pool: BlockPool, copies: PendingCopies, block_size: int, parent: Sequence, first: Seq[DrawnToken], step: DecodeStep
) -> Branches:
    """The choices that go on after their `first` tokens, which `step` gets. None held: the parent keeps its blocks."""
    branches = Branches()
    position = len(parent.tokens)
    for token in first:
        if token.choice not in parent.choices:
            continue
        step.add(parent.request.id, position, token)
        if token.finish_reason is not None:
            continue
        child = Sequence(
            parent.request, (token.choice,), [*parent.tokens, token.token_id], list(parent.hashes), [], position
        )
        if not branches.held:
            child.blocks, child.num_gone = parent.blocks, parent.num_gone
            branches.held.append(child)
        elif _copy_table(pool, copies, parent, position // block_size, child):
            branches.held.append(child)
        else:
            child.num_computed, child.hashes = 0, []
            branches.homeless.append(child)
    return branches


def _copy_table(pool: BlockPool, copies: PendingCopies, parent: Sequence, num_full: int, child: Sequence) -> bool:
    shared, partial = parent.blocks[:num_full], parent.blocks[num_full:]
    fresh = pool.allocate(len(partial))
    if fresh is None:
        return False
    pool.acquire(shared[parent.num_gone :])
    child.blocks, child.num_gone = [*shared, *fresh], parent.num_gone
    for source, target in zip(partial, fresh, strict=True):
        copies.add(source, target)
    return True

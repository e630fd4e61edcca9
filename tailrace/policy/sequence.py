"""What the decode scheduler keeps: sequences, arrivals, and what a step drew."""

from dataclasses import dataclass, field

from tailrace.policy.request import DrawnToken, Request
from tailrace.types import FinishReason, SequenceKey


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice, or a prompt that will fork into several. The KV of the last drawn token is never computed yet."""

    request: Request
    choices: tuple[int, ...]
    tokens: list[int]
    hashes: list[bytes]
    """Of leading full blocks of `tokens`; those of computed tokens are registered with the pool."""
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    slot: int = -1
    slot_choice: int = -1
    """The choice whose draws the runner appends to the slot."""

    @property
    def key(self) -> SequenceKey:
        return SequenceKey(self.request.id, self.choices[0])

    @property
    def rank(self) -> tuple[int, int, int]:
        return (*self.request.rank, self.choices[0])


@dataclass(slots=True, eq=False)
class Arrival:
    """A booked request. `blocks` is its whole block table once granted; entries from `num_local` on land one by one."""

    request: Request
    num_blocks: int
    wanted: bool = False
    blocks: list[int] = field(default_factory=list)
    num_local: int = 0
    """Leading blocks found in this worker's own cache: nothing to pull."""
    landed: set[int] = field(default_factory=set)

    @property
    def is_granted(self) -> bool:
        return bool(self.blocks)


@dataclass(frozen=True, slots=True)
class Finish:
    key: SequenceKey
    reason: FinishReason


@dataclass(slots=True)
class DecodeStep:
    """What one step drew, as columns of one length, and who ended by it."""

    keys: list[SequenceKey] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    drawn: list[DrawnToken] = field(default_factory=list)
    finished: list[Finish] = field(default_factory=list)
    computed_tokens: int = 0

    def add(self, sequence_id: int, position: int, token: DrawnToken) -> None:
        key = SequenceKey(sequence_id, token.choice)
        self.keys.append(key)
        self.positions.append(position)
        self.drawn.append(token)
        if token.finish_reason is not None:
            self.finished.append(Finish(key, token.finish_reason))

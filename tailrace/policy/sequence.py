"""What the decode scheduler keeps: sequences, arrivals, and what a step drew."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from tailrace.messages import TokenColumns
from tailrace.plan import SequenceStart
from tailrace.policy.request import DrawnToken, Request
from tailrace.types import FinishReason, SequenceKey


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice, or a prompt that will fork into several. The KV of the last drawn token is never computed yet."""

    request: Request
    choices: tuple[int, ...]
    tokens: list[int]
    """Known ones: those that a step in flight draws come when it is finished."""
    hashes: list[bytes]
    """Of leading full blocks of `tokens`; those of computed tokens are registered."""
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    """Tokens whose KV is written and whose full blocks are registered. While it runs: as of its last full block."""
    slot: int = -1
    """-1: nowhere. A step in flight may still compute a row for it, which is nobody's then."""
    slot_choice: int = -1
    """The choice whose draws the runner appends to the slot."""

    elsewhere: Seq[range] = ()
    """Blocks of a new prompt's chain that others are said to hold, to be fetched where they are not here."""

    # Filled in by the scheduler.
    num_gone: int = 0
    """Leading entries of `blocks` that lie before the window of its next token, and are no longer its own."""
    num_found: int = 0
    """Leading blocks that were here, or fetched, when it began to be computed here."""
    num_offered: int = 0
    """Leading blocks that a store was offered when it gave way, and may bring back."""
    num_planned: int = 0
    """As num_computed, once the steps in flight are over. For prompts."""
    num_tokens: int = 0
    """As many as `tokens` will be once the steps in flight are over. While it runs."""
    room: int = 0
    """Up to here num_tokens may grow without anybody looking: then its blocks are full, or its last token is drawn."""
    watch: int = 0
    """Up to here `tokens` may grow without anybody looking: then a block is computed, or it ends."""
    limit: int = 0
    """It ends with this many tokens, whatever they are."""
    ending: frozenset[int] = frozenset()
    """Tokens that may end it."""

    @property
    def key(self) -> SequenceKey:
        return SequenceKey(self.request.id, self.choices[0])

    @property
    def rank(self) -> tuple[int, int, int]:
        return (*self.request.rank, self.choices[0])

    @property
    def is_gone(self) -> bool:
        """Ended, cancelled or preempted since its row was planned."""
        return self.slot < 0

    @property
    def held(self) -> list[int]:
        """Those of `blocks` that it refers to."""
        return self.blocks[self.num_gone :]

    def enter(self, slot: int | None) -> None:
        """The slot is its own from now on; callers have looked whether there is one."""
        assert slot is not None
        self.slot, self.slot_choice = slot, self.choices[0]

    def as_start(self) -> SequenceStart:
        """For a plan, which may be carried out when this has changed."""
        return SequenceStart(
            slot=self.slot,
            tokens=list(self.tokens),
            num_prompt_tokens=self.request.num_prompt_tokens,
            sampling=self.request.sampling,
            choice=self.choices[0],
            blocks=list(self.blocks),
        )


@dataclass(slots=True, eq=False)
class Arrival:
    """A booked request. `blocks` is its whole block table once granted; entries from `num_local` on land one by one."""

    request: Request
    num_blocks: int
    """That it will hold."""
    num_gone: int = 0
    """Leading entries of `blocks` that its next token does not need, and that nobody is asked for."""
    wanted: bool = False
    blocks: list[int] = field(default_factory=list)
    num_local: int = 0
    """Leading entries with nothing to pull: gone, or found in this worker's own cache."""
    landed: set[int] = field(default_factory=set)

    @property
    def is_granted(self) -> bool:
        return bool(self.blocks)

    @property
    def held(self) -> list[int]:
        return self.blocks[self.num_gone :]


@dataclass(frozen=True, slots=True)
class Finish:
    key: SequenceKey
    reason: FinishReason


@dataclass(slots=True)
class DecodeStep:
    """What one step drew, and who ended by it."""

    tokens: TokenColumns = field(default_factory=TokenColumns)
    """Handles are request ids."""
    finished: list[Finish] = field(default_factory=list)
    prefilled: list[int] = field(default_factory=list)
    """Requests whose prompt drew here."""
    bad: list[int] = field(default_factory=list)
    """Requests for which nothing could be drawn: they cannot go on, and their other choices are still held."""
    computed_tokens: int = 0

    def add(self, request_id: int, position: int, token: DrawnToken) -> None:
        self.tokens.add(request_id, token.choice, position, token.token_id, token.logprob)
        if token.finish_reason is not None:
            self.finished.append(Finish(SequenceKey(request_id, token.choice), token.finish_reason))

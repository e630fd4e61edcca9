"""StepPlan: what a scheduler returns and a runner executes. No tensors.

A *slot* is a row of the runner's batch state, 0 <= slot < max_num_seqs. A plan tells the runner which rows begin and
end, so that everything it keeps between steps is updated by difference. The runner applies a plan in the order of its
fields.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tailrace.types import SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class SequenceStart:
    """A sequence takes a slot, with the blocks it has so far."""

    slot: int
    tokens: Sequence[int]
    """Prompt and tokens generated so far; the KV of some of them may not be computed yet."""
    num_prompt_tokens: int
    sampling: SamplingParams
    choice: int
    blocks: Sequence[int]


@dataclass(frozen=True, slots=True)
class BlockAppend:
    """The slot's block table grows by `blocks`, starting at entry `index`."""

    slot: int
    index: int
    blocks: Sequence[int]


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Copy one whole block inside the pool, before the forward pass."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute the KV of tokens [start, end) of a slot.

    `choices`: draw one token for each of them from the logits of token end - 1 (empty: draw none). A token drawn for
    the slot's own choice is appended to the slot's tokens by the runner; others are only reported.
    """

    slot: int
    start: int
    end: int
    choices: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One engine step. `decode` slots compute the KV of their last token and draw the next one, which is appended."""

    released: Sequence[int] = ()
    started: Sequence[SequenceStart] = ()
    appended: Sequence[BlockAppend] = ()
    copies: Sequence[BlockCopy] = ()
    chunks: Sequence[Chunk] = ()
    decode: Sequence[int] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.decode) + sum(chunk.end - chunk.start for chunk in self.chunks)

    @property
    def is_empty(self) -> bool:
        """Nothing to compute. Starts, releases and copies may still have to be applied."""
        return not self.chunks and not self.decode

    @property
    def changes_anything(self) -> bool:
        """The runner must see this plan, if only to update its rows."""
        return bool(self.chunks or self.decode or self.released or self.started or self.appended or self.copies)


@dataclass(slots=True)
class StepOutput:
    """Drawn tokens as columns of one length: first those of `plan.decode` in its order, then those of the chunks."""

    slots: list[int] = field(default_factory=list)
    choices: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob | None] | None = None
    """None when no row asked for them."""
    bad_rows: Sequence[int] = ()
    """Rows whose logits nothing could be drawn from (NaN, or every token masked): their token is meaningless."""
    elapsed_s: float = 0.0
    """Of the whole run, measured by the runner."""

    def wait(self) -> "StepOutput":
        """Itself: what a runner that computes at once gives back is over already."""
        return self

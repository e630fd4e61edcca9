"""The running batch: who decodes, and when somebody has to look at one of them.

A step of hundreds of sequences may cost microseconds only, so what is the same in every step is kept, and of each
sequence no more is asked than whether it is past a mark.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import compress

from tailrace.messages import TokenColumns
from tailrace.plan import StepOutput
from tailrace.policy.request import StopRule
from tailrace.policy.sequence import Sequence
from tailrace.types import SequenceKey


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The decode rows of a plan, as columns. Made again when somebody comes or goes, never changed."""

    sequences: list[Sequence]
    slots: list[int]
    handles: list[int]
    choices: list[int]

    @classmethod
    def of(cls, sequences: list[Sequence]) -> "DecodeRows":
        return cls(
            sequences,
            [sequence.slot for sequence in sequences],
            [sequence.request.id for sequence in sequences],
            [sequence.choices[0] for sequence in sequences],
        )


@dataclass(frozen=True, slots=True)
class PlannedRows:
    """Whom the rows of a plan belong to: its decode rows, and its chunks in their order."""

    decode: DecodeRows
    prompts: list[Sequence]


@dataclass(frozen=True, slots=True)
class DrawnRows:
    """What was drawn for sequences that are still there, a row each."""

    sequences: list[Sequence]
    tokens: TokenColumns


def drawn_rows(rows: DecodeRows, out: StepOutput) -> DrawnRows:
    """The decode rows of `out`, without those whose sequence is gone."""
    count = len(rows.sequences)
    logprobs = None if out.logprobs is None else out.logprobs[:count]
    drawn = TokenColumns(rows.handles, rows.choices, out.positions[:count], out.tokens[:count], logprobs)
    is_there = [sequence.slot >= 0 for sequence in rows.sequences]
    if all(is_there):
        return DrawnRows(rows.sequences, drawn)
    kept = TokenColumns(
        list(compress(drawn.handles, is_there)),
        list(compress(drawn.choices, is_there)),
        list(compress(drawn.positions, is_there)),
        list(compress(drawn.token_ids, is_there)),
        None if logprobs is None else list(compress(logprobs, is_there)),
    )
    return DrawnRows(list(compress(rows.sequences, is_there)), kept)


@dataclass(frozen=True, slots=True)
class Due:
    """Who cannot just go on at the next step."""

    growing: list[Sequence]
    """Their last token starts a block."""
    has_ended: bool
    """The step in flight draws somebody's last token."""


class RunningBatch:
    """In the order in which they came."""

    def __init__(self, block_size: int, stop: StopRule) -> None:
        self._block_size = block_size
        self._stop = stop
        self._sequences: dict[SequenceKey, Sequence] = {}
        self._rows: DecodeRows | None = None
        """Of them all; None: somebody came or went."""

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, sequence: Sequence) -> bool:
        return self._sequences.get(sequence.key) is sequence

    def sequences(self) -> Seq[Sequence]:
        return list(self._sequences.values())

    def add(self, sequence: Sequence) -> None:
        """It has a slot, and everything but its last token is computed or will be."""
        sequence.num_tokens = len(sequence.tokens)
        sequence.limit = self._stop.limit(sequence.request)
        sequence.ending = self._stop.ending_tokens(sequence.request)
        self.set_room(sequence)
        self.set_watch(sequence)
        self._sequences[sequence.key] = sequence
        self._rows = None

    def discard(self, sequence: Sequence) -> None:
        """Also somebody who does not run."""
        if sequence in self:
            del self._sequences[sequence.key]
            self._rows = None

    def set_room(self, sequence: Sequence) -> None:
        """Its blocks are new."""
        sequence.room = min(len(sequence.blocks) * self._block_size, sequence.limit - 1)

    def set_watch(self, sequence: Sequence) -> None:
        """Its tokens have been looked at; the KV of the last one is not computed yet."""
        next_full = ((len(sequence.tokens) - 1) // self._block_size + 1) * self._block_size
        sequence.watch = min(next_full, sequence.limit - 1)

    def due(self) -> Due:
        past = [s for s in self._sequences.values() if s.num_tokens > s.room]
        growing = [s for s in past if s.num_tokens < s.limit]
        return Due(growing, len(growing) < len(past))

    def rows(self, *, has_ended: bool) -> DecodeRows:
        """Everybody's whose last token is not drawn yet."""
        if has_ended:
            return DecodeRows.of([s for s in self._sequences.values() if s.num_tokens < s.limit])
        if self._rows is None:
            self._rows = DecodeRows.of(list(self._sequences.values()))
        return self._rows

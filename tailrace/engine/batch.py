"""BatchState: what the runner keeps between steps, a row a slot; and the tensors of one step made from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tailrace.engine.host_copies import upload
from tailrace.engine.kernels.attention_decode import DecodeRows, decode_rows
from tailrace.engine.kernels.attention_prefill import ChunkSpan, chunk_span, joins_chunks, joint_span
from tailrace.engine.kernels.kv_write import write_rows
from tailrace.plan import BlockAppend, Chunk, SequenceStart, StepPlan


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """Tokens [begin, end) of the step, of one chunk or of all, and what their attention reads."""

    begin: int
    end: int
    span: ChunkSpan


@dataclass(frozen=True, slots=True)
class AttentionRows:
    """The step as layers of one window see it: decode rows first, then the chunks."""

    num_decode: int
    decode: DecodeRows | None
    chunks: tuple[ChunkRows, ...]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step's flat list of tokens: a token for each decode row, then chunk after chunk."""

    token_ids: Tensor
    """[tokens] int64"""
    positions: Tensor
    """[tokens] int64"""
    write_rows: Tensor
    """[tokens, 2 * kv_heads] int64, of kernels.kv_write."""
    attention: Mapping[int, AttentionRows]
    """By window; 0 is full attention."""


@dataclass(frozen=True, slots=True)
class Draws:
    """The tokens that one step draws, as columns: decode rows, then chunks, a row for each choice."""

    rows: Tensor | None
    """[logit rows] int64, tokens of the step whose logits are wanted; None: all tokens, in order."""
    logit_rows: Tensor | None
    """[draws] int64, which of these rows each draw reads; None: one draw a row, in order."""
    slots: Tensor
    choices: Tensor
    positions: Tensor
    """Each [draws] int64; a position is the number of tokens before the drawn one."""
    own: Tensor | None
    """[own draws] int64, the draws that their slot's sequence takes; None: all of them."""


@dataclass(frozen=True, slots=True)
class DrawColumns:
    """The same as the host knows them before the device has computed anything."""

    slots: list[int]
    choices: list[int]
    positions: list[int]
    own_slots: list[int]
    """Slots whose sequences take what is drawn."""

    @classmethod
    def none(cls) -> "DrawColumns":
        return cls([], [], [], [])


class BatchState:
    """Rows of `max_num_seqs` slots, changed only by what a plan says and by what is drawn.

    The host never asks the device: what it decides by it keeps a copy of.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self.max_model_len = max_model_len
        self.block_size = block_size
        self.device = device
        max_blocks = -(-max_model_len // block_size)
        self.tables = torch.zeros(max_num_seqs, max_blocks, dtype=torch.int32, device=device)
        self.tokens = torch.zeros(max_num_seqs, max_model_len, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        """Tokens known so far, of which the last one's KV is not computed yet while the slot decodes."""
        self.choices = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._host_lengths = np.zeros(max_num_seqs, dtype=np.int64)
        self._host_choices = np.zeros(max_num_seqs, dtype=np.int64)

    def update(self, started: Sequence[SequenceStart], appended: Sequence[BlockAppend]) -> None:
        """New rows, and further blocks of rows that run; all tables are written at once.

        Raises ValueError when tokens do not fit a row, or a table has no such entries.
        """
        for start in started:
            self._start(start)
        self._append_blocks([*(BlockAppend(start.slot, 0, start.blocks) for start in started), *appended])

    def _start(self, start: SequenceStart) -> None:
        """All but its blocks."""
        num_tokens = len(start.tokens)
        if not 0 < num_tokens <= self.max_model_len:
            raise ValueError(f"slot {start.slot}: {num_tokens} tokens, a row holds 1 to {self.max_model_len}")
        self.tokens[start.slot, :num_tokens] = upload(start.tokens, torch.int32, self.device)
        self.lengths[start.slot] = num_tokens
        self._host_lengths[start.slot] = num_tokens
        self.choices[start.slot] = start.choice
        self._host_choices[start.slot] = start.choice

    def _append_blocks(self, appends: Sequence[BlockAppend]) -> None:
        slots: list[int] = []
        entries: list[int] = []
        blocks: list[int] = []
        for append in appends:
            end = append.index + len(append.blocks)
            if append.index < 0 or end > self.tables.shape[1]:
                raise ValueError(f"slot {append.slot}: table entries {append.index} to {end} of {self.tables.shape[1]}")
            slots += [append.slot] * len(append.blocks)
            entries += range(append.index, end)
            blocks += append.blocks
        if blocks:
            rows = upload([slots, entries, blocks], torch.int64, self.device)
            self.tables[rows[0], rows[1]] = rows[2].int()

    def take(self, draws: Draws, columns: DrawColumns, token_ids: Tensor) -> None:
        """Appends the drawn tokens ([draws] int64) to the sequences that own them."""
        slots, positions = draws.slots, draws.positions
        if draws.own is not None:
            slots, positions, token_ids = slots[draws.own], positions[draws.own], token_ids[draws.own]
        self.tokens[slots, positions] = token_ids.int()
        self.lengths[slots] = positions + 1
        self._host_lengths[columns.own_slots] += 1

    def inputs(self, plan: StepPlan, pool: Tensor, windows: Sequence[int]) -> StepInputs:
        """pool: [num_blocks, layers, 2, kv_heads, block, head_dim]; windows: those the model's layers have."""
        decode = upload(plan.decode, torch.int64, self.device)
        positions = self._positions(plan, decode)
        slots = _slot_of_tokens(plan, decode)
        blocks = self.tables[slots, positions // self.block_size].long()
        return StepInputs(
            token_ids=self.tokens[slots, positions].long(),
            positions=positions,
            write_rows=write_rows(pool, blocks, positions % self.block_size),
            attention={window: self._attention(plan, decode, pool, window) for window in windows},
        )

    def _positions(self, plan: StepPlan, decode: Tensor) -> Tensor:
        parts = [self.lengths[decode] - 1]
        parts += [torch.arange(chunk.start, chunk.end, device=self.device) for chunk in plan.chunks]
        return torch.cat(parts) if plan.chunks else parts[0]

    def _attention(self, plan: StepPlan, decode: Tensor, pool: Tensor, window: int) -> AttentionRows:
        rows = None
        if plan.decode:
            host_lengths = self._host_lengths[list(plan.decode)].tolist()
            rows = decode_rows(pool, self.tables[decode], self.lengths[decode], host_lengths, window)
        return AttentionRows(len(plan.decode), rows, self._chunks(plan, pool, window))

    def _chunks(self, plan: StepPlan, pool: Tensor, window: int) -> tuple[ChunkRows, ...]:
        if plan.chunks and joins_chunks(pool):
            return (self._joint_chunks(plan, pool, window),)
        chunks, begin = [], len(plan.decode)
        for chunk in plan.chunks:
            end = begin + chunk.end - chunk.start
            span = chunk_span(pool, self.tables[chunk.slot], chunk.start, chunk.end, window)
            chunks.append(ChunkRows(begin, end, span))
            begin = end
        return tuple(chunks)

    def _joint_chunks(self, plan: StepPlan, pool: Tensor, window: int) -> ChunkRows:
        tables = self.tables[upload([chunk.slot for chunk in plan.chunks], torch.int64, self.device)]
        ranges = [(chunk.start, chunk.end) for chunk in plan.chunks]
        begin = len(plan.decode)
        end = begin + sum(end - start for start, end in ranges)
        return ChunkRows(begin, end, joint_span(pool, tables, ranges, window))

    def draw_columns(self, plan: StepPlan) -> DrawColumns:
        """Before `take`. Raises ValueError for a chunk that draws for its own sequence elsewhere than at its end."""
        decode = list(plan.decode)
        columns = DrawColumns(
            slots=decode,
            choices=self._host_choices[decode].tolist(),
            positions=self._host_lengths[decode].tolist(),
            own_slots=decode.copy(),
        )
        for chunk in plan.chunks:
            self._add_chunk(columns, chunk)
        return columns

    def _add_chunk(self, columns: DrawColumns, chunk: Chunk) -> None:
        if self._host_choices[chunk.slot] in chunk.choices:
            length = self._host_lengths[chunk.slot]
            if chunk.end != length:
                raise ValueError(f"slot {chunk.slot}: draws after token {chunk.end} of {length}")
            columns.own_slots.append(chunk.slot)
        columns.slots.extend([chunk.slot] * len(chunk.choices))
        columns.choices.extend(chunk.choices)
        columns.positions.extend([chunk.end] * len(chunk.choices))

    def draws(self, plan: StepPlan, columns: DrawColumns) -> Draws:
        """columns: of this plan."""
        known = [columns.slots, columns.choices, columns.positions]
        slots, choices, positions = upload(known, torch.int64, self.device)
        if not plan.chunks:
            return Draws(None, None, slots, choices, positions, None)
        picked = _picked(plan, self._host_choices)
        rows, logit_rows, own = (upload(column, torch.int64, self.device) for column in picked)
        return Draws(rows, logit_rows, slots, choices, positions, own)


def _picked(
    plan: StepPlan, own_choices: "np.ndarray[tuple[int], np.dtype[np.int64]]"
) -> tuple[list[int], list[int], list[int]]:
    """Tokens whose logits are wanted, which of these each draw reads, and which draws their slot's sequence takes."""
    num_tokens = len(plan.decode)
    rows, logit_rows, own = (list(range(num_tokens)) for _ in range(3))
    for chunk in plan.chunks:
        num_tokens += chunk.end - chunk.start
        if not chunk.choices:
            continue
        rows.append(num_tokens - 1)
        for choice in chunk.choices:
            if choice == own_choices[chunk.slot]:
                own.append(len(logit_rows))
            logit_rows.append(len(rows) - 1)
    return rows, logit_rows, own


def _slot_of_tokens(plan: StepPlan, decode: Tensor) -> Tensor:
    if not plan.chunks:
        return decode
    parts = [torch.full((chunk.end - chunk.start,), chunk.slot, device=decode.device) for chunk in plan.chunks]
    return torch.cat((decode, *parts))

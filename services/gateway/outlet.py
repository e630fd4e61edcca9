"""The short way of a streamed answer: from the worker's message to the client's socket in one call a step.

Mirrors native/outlet.c. Everything that is out of the ordinary goes the whole way, through the session and the answer,
which then say with `expect` and `is_open` from where on the short way may be taken again: a token that comes out of
turn, or while anything else waits to be written, is left alone. Where there is no C compiler there is no short way.
"""

import ctypes
import logging
from array import array
from ctypes import POINTER, c_char, c_double, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from pathlib import Path

from services.gateway.direct import DirectBody, framed
from services.gateway.http_metrics import TokenHistogram
from services.gateway.vocabulary import Vocabulary
from tailrace.compiler import NativeUnavailableError, Source
from tailrace.messages import TokenColumns

_log = logging.getLogger(__name__)
_SOURCE = Source("outlet", Path(__file__).parent / "native" / "outlet.c", ("-std=gnu11", "-O2", "-D_GNU_SOURCE"))
_CELL_TEXT = 31
_MAX_TEXT = 720
_MAX_TAKEN = 128
_TAKEN, _LEFT = 0, -1
NUM_SLOTS = 1 << 14
"""Handles are given out in turn: of two requests that so many others lie between, the later one goes the whole way."""


@dataclass(frozen=True, slots=True)
class TextChunk:
    """What is constant in the chunks of one choice that have a text and nothing else, encoded once."""

    before: bytes
    after: bytes

    def of(self, text: str) -> bytes:
        return b"%b%b%b" % (self.before, encode_basestring_ascii(text).encode(), self.after)


class _Desk(ctypes.Structure):
    _fields_ = [
        ("cells", c_void_p),
        ("num_cells", c_uint64),
        ("bounds", c_void_p),
        ("num_bounds", c_uint64),
        ("counts", c_void_p),
        ("sum", c_void_p),
    ]


class _Outlet(ctypes.Structure):
    _fields_ = [
        ("desk", POINTER(_Desk)),
        ("handle", c_uint64),
        ("wrote_at", c_double),
        ("fd", c_int32),
        ("is_open", c_uint32),
        ("position", c_uint32),
        ("num_taken", c_uint32),
        ("before", c_uint32),
        ("after", c_uint32),
        ("text", c_char * _MAX_TEXT),
        ("taken", c_uint32 * _MAX_TAKEN),
    ]


class StepWriter:
    """The compiled functions. They keep the interpreter's lock: nothing in them waits."""

    def __init__(self, functions: ctypes.PyDLL) -> None:
        self.write_step = functions.tailrace_write_step
        self.write_step.argtypes = (c_void_p, c_uint64, c_int64, *(c_void_p,) * 5)
        self.write_step.restype = c_int64
        self.take = functions.tailrace_take
        self.take.argtypes, self.take.restype = (c_void_p, c_uint32, c_uint32), c_int32
        sizes = (c_int64 * 3)()
        functions.tailrace_sizes(sizes)
        assert list(sizes) == [1 + _CELL_TEXT, ctypes.sizeof(_Desk), ctypes.sizeof(_Outlet)], (
            "outlet.py and outlet.c differ"
        )


def load_step_writer(cache_dir: Path) -> StepWriter | None:
    """None, with a warning, where it cannot be compiled."""
    try:
        return StepWriter(_SOURCE.load(ctypes.PyDLL, cache_dir))
    except NativeUnavailableError as error:
        _log.warning("the short way of streamed tokens is off, and each costs the gateway more: %s", error)
        return None


class Desk:
    """Makes the outlets of one gateway."""

    def __init__(self, writer: StepWriter, vocabulary: Vocabulary, icl: TokenHistogram) -> None:
        self.writer = writer
        self.vocabulary = vocabulary
        self._cells = _cells(vocabulary)
        self._icl = icl
        self.struct = _Desk(
            self._cells.buffer_info()[0],
            vocabulary.num_tokens,
            icl.bounds.buffer_info()[0],
            len(icl.bounds),
            icl.counts.buffer_info()[0],
            icl.sum.buffer_info()[0],
        )

    def outlet(self, body: DirectBody, chunk: TextChunk) -> "Outlet | None":
        """None where there is no short way to this client: its connection is encrypted, or its chunks are too long."""
        if body.socket_fd is None or len(chunk.before) + len(chunk.after) + 2 > _MAX_TEXT:
            return None
        return Outlet(self, body, chunk)


def _cells(vocabulary: Vocabulary) -> "array[int]":
    """A byte of size and the escaped text, by token id; size 0 for a token that is not all text, or long."""
    cells = []
    for token_id in range(vocabulary.num_tokens):
        text = _escaped(vocabulary, token_id)
        cells.append(bytes((len(text),)) + text.ljust(_CELL_TEXT, b"\0"))
    return array("B", b"".join(cells))


def _escaped(vocabulary: Vocabulary, token_id: int) -> bytes:
    text = None if token_id in vocabulary.special_ids else vocabulary.text(token_id)
    escaped = encode_basestring_ascii(text or "")[1:-1].encode()
    return escaped if len(escaped) <= _CELL_TEXT else b""


class Outlet:
    """One answer of one choice. Event loop only."""

    def __init__(self, desk: Desk, body: DirectBody, chunk: TextChunk) -> None:
        self._desk = desk
        self._body = body
        self._before, self._after = chunk.before + b'"', b'"' + chunk.after
        assert body.socket_fd is not None
        self.struct = _Outlet(
            ctypes.pointer(desk.struct),
            fd=body.socket_fd,
            before=len(self._before),
            after=len(self._after),
            text=self._before + self._after,
        )
        self._address = ctypes.addressof(self.struct)
        self._num_collected = 0
        self._num_told = 0

    # -- for the session: which token comes next, and which have come -------------------------------------------------

    def expect(self, position: int) -> None:
        """The next token's. All before it have been collected."""
        self.struct.position = position

    def collect(self) -> list[int]:
        """The tokens taken since the last call, in order."""
        if not (count := self.struct.num_taken):
            return []
        self.struct.num_taken = 0
        self._num_collected += count
        return list(self.struct.taken[:count])

    # -- for the answer: whether tokens may be taken, and how many were -----------------------------------------------

    @property
    def wrote_at(self) -> float:
        """Monotonic seconds."""
        return float(self.struct.wrote_at)

    def open(self, wrote_at: float) -> None:
        """The client has been sent all there was, at that time; the text is between two characters."""
        self.struct.wrote_at, self.struct.is_open = wrote_at, 1

    def close(self) -> None:
        self.struct.is_open = 0

    def num_new(self) -> int:
        """Tokens taken since the last call."""
        total = self._num_collected + self.struct.num_taken
        count, self._num_told = total - self._num_told, total
        return int(count)

    # -- for whoever has tokens ---------------------------------------------------------------------------------------

    def take(self, position: int, token_id: int) -> bool:
        """False, and nothing done: it must go the whole way."""
        return self.settle(self._desk.writer.take(self._address, position, token_id), token_id)

    def settle(self, outcome: int, token_id: int) -> bool:
        """Whether the token was taken; what its client's socket did not take of it is left to the connection."""
        if outcome == _LEFT:
            return False
        if outcome != _TAKEN:
            text = _escaped(self._desk.vocabulary, token_id)
            self._body.write_rest(framed(self._before + text + self._after)[outcome:])
        return True


class Board:
    """Which handles of one worker have an outlet."""

    def __init__(self, writer: StepWriter) -> None:
        self._write_step = writer.write_step
        self._slots = (c_void_p * NUM_SLOTS)()
        self._address = ctypes.addressof(self._slots)
        self._outlets: dict[int, Outlet] = {}
        self._outcomes = array("i")

    def __len__(self) -> int:
        return len(self._outlets)

    def connect(self, handle: int, outlet: Outlet) -> None:
        """Until `disconnect`. Where the handle's place is taken, this does nothing."""
        slot = handle % NUM_SLOTS
        if not self._slots[slot] or handle in self._outlets:
            self._outlets[handle] = outlet
            outlet.struct.handle = handle
            self._slots[slot] = ctypes.addressof(outlet.struct)

    def disconnect(self, handle: int) -> None:
        if self._outlets.pop(handle, None) is not None:
            self._slots[handle % NUM_SLOTS] = None

    def write(self, columns: TokenColumns) -> list[int]:
        """Takes what it can. Returns the other rows, in order."""
        num_rows = len(columns.handles)
        if num_rows > len(self._outcomes):
            self._outcomes = array("i", bytes(4 * num_rows))
        rows = (
            array("Q", columns.handles),
            array("I", columns.choices),
            array("I", columns.positions),
            array("I", columns.token_ids),
            self._outcomes,
        )
        addresses = [column.buffer_info()[0] for column in rows]
        if not self._write_step(self._address, NUM_SLOTS, num_rows, *addresses):
            return []
        return [row for row in range(num_rows) if self._outcomes[row] != _TAKEN]

    def is_settled(self, row: int, handle: int, token_id: int) -> bool:
        """Of a row that the last `write` returned: it was taken, but for what `Outlet.settle` did now."""
        outcome = self._outcomes[row]
        return outcome != _LEFT and self._outlets[handle].settle(outcome, token_id)

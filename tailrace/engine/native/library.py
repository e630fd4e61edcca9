"""The compiled kernels as Python sees them. Mirrors the structs of source/model.h and decoder.c."""

import ctypes
import platform
from ctypes import POINTER, c_double, c_float, c_int, c_int64, c_void_p
from pathlib import Path

from tailrace.compiler import Source

_MAIN = Path(__file__).parent / "source" / "decoder.c"
_FLAGS = (
    "-std=gnu11",
    "-O3",
    "-march=native",
    # NaN and infinity keep their meaning: masks and bad rows need them.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-pthread",
)
_WIDE_VECTORS = ("-mprefer-vector-width=512",)
_DTYPE_FLAGS = {"bfloat16": ("-DBFLOAT16",), "float32": ()}
PHASES = ("embedding", "norms", "qkv", "rotary", "attention", "attention_out", "gate_up", "down", "head")
"""What a step's time goes to; enum Phase of source/clock.h."""


class LinearStruct(ctypes.Structure):
    _fields_ = [
        ("inputs", c_int64),
        ("outputs", c_int64),
        ("words", c_void_p),
        ("bias", c_void_p),
        ("scales", c_void_p),
    ]


class LayerStruct(ctypes.Structure):
    _fields_ = [
        ("attention_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("qkv", LinearStruct),
        ("attention_out", LinearStruct),
        ("gate_up", LinearStruct),
        ("down", LinearStruct),
        ("window", c_int64),
    ]


class ModelStruct(ctypes.Structure):
    _fields_ = [
        ("num_layers", c_int64),
        ("hidden", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("inner", c_int64),
        ("vocab", c_int64),
        ("max_positions", c_int64),
        ("eps", c_double),
        ("embedding", c_void_p),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("final_norm", c_void_p),
        ("head", LinearStruct),
        ("layers", POINTER(LayerStruct)),
        ("threads", c_void_p),
        ("block", c_int64),
        ("num_blocks", c_int64),
    ]


class ClockStruct(ctypes.Structure):
    _fields_ = [("since", c_double), ("seconds", c_double * len(PHASES))]


class ChunkStruct(ctypes.Structure):
    _fields_ = [("slot", c_int64), ("start", c_int64), ("end", c_int64)]


class StepStruct(ctypes.Structure):
    _fields_ = [
        ("num_tokens", c_int64),
        ("num_decode", c_int64),
        ("num_chunks", c_int64),
        ("decode", POINTER(c_int64)),
        ("chunks", POINTER(ChunkStruct)),
        ("tokens", c_void_p),
        ("tokens_stride", c_int64),
        ("tables", c_void_p),
        ("tables_stride", c_int64),
        ("lengths", c_void_p),
        ("num_slots", c_int64),
        ("pool", c_void_p),
        ("hidden", c_void_p),
        ("places", c_void_p),
        ("input", c_void_p),
        ("qkv", c_void_p),
        ("gated", c_void_p),
        ("rounded", c_void_p),
        ("partials", c_void_p),
        ("jobs", POINTER(c_int64)),
        ("clock", POINTER(ClockStruct)),
    ]


class LogitsStruct(ctypes.Structure):
    _fields_ = [
        ("model", POINTER(ModelStruct)),
        ("hidden", c_void_p),
        ("rows", c_int64),
        ("normed", c_void_p),
        ("rounded", c_void_p),
        ("logits", c_void_p),
        ("clock", POINTER(ClockStruct)),
    ]


class ProductStruct(ctypes.Structure):
    _fields_ = [
        ("linear", POINTER(LinearStruct)),
        ("x", c_void_p),
        ("rows", c_int64),
        ("rounded", c_void_p),
        ("out", c_void_p),
    ]


class RefinementStruct(ctypes.Structure):
    _fields_ = [
        ("threads", c_void_p),
        ("logits", c_void_p),
        ("rows", c_int64),
        ("vocab", c_int64),
        ("inputs", c_int64),
        ("x", c_void_p),
        ("weight", c_void_p),
        ("share", c_float),
    ]


_STRUCTS = (
    *(LinearStruct, LayerStruct, ModelStruct, ChunkStruct, StepStruct, LogitsStruct, ProductStruct),
    RefinementStruct,
)


class NativeLibrary:
    """Its functions run without the interpreter's lock."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        self._functions = functions
        self.forward = self._functions.tailrace_forward
        self.forward.argtypes, self.forward.restype = (c_void_p, c_void_p), c_int
        self.logits = self._functions.tailrace_logits
        self.logits.argtypes, self.logits.restype = (c_void_p,), None
        self.refine = self._functions.tailrace_refine
        self.refine.argtypes, self.refine.restype = (c_void_p,), None
        self.product = self._functions.tailrace_product
        self.product.argtypes, self.product.restype = (c_void_p, c_void_p), None
        self.rounded_bytes = self._functions.tailrace_rounded_bytes
        self.rounded_bytes.argtypes, self.rounded_bytes.restype = (c_int64,), c_int64
        self.num_parts = self._functions.tailrace_num_parts
        self.num_parts.argtypes, self.num_parts.restype = (c_void_p, c_void_p), c_int64
        self.open_threads = self._functions.tailrace_open_threads
        self.open_threads.argtypes, self.open_threads.restype = (c_int64,), c_void_p
        self.close_threads = self._functions.tailrace_close_threads
        self.close_threads.argtypes, self.close_threads.restype = (c_void_p,), None
        self._check()

    def _check(self) -> None:
        sizes = (c_int64 * len(_STRUCTS))()
        self._functions.tailrace_sizes(sizes)
        assert list(sizes) == list(map(ctypes.sizeof, _STRUCTS)), "library.py and decoder.c differ"


def source_for(dtype: str) -> Source:
    """Of the kernels for "bfloat16" or "float32"."""
    wide = _WIDE_VECTORS if platform.machine() in ("x86_64", "AMD64") else ()
    return Source(dtype, _MAIN, (*_FLAGS, *wide, *_DTYPE_FLAGS[dtype]))


def load_library(dtype: str, cache_dir: Path) -> NativeLibrary:
    """Raises NativeUnavailableError."""
    return NativeLibrary(source_for(dtype).load(ctypes.CDLL, cache_dir))

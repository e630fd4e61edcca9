"""Writing a safetensors file from numpy, tensor by tensor, with weights rounded to bfloat16."""

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def to_bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bit patterns of `values` as bfloat16, round to nearest, ties to even; any shape.

    A NaN stays a NaN: its quiet bit is set instead of letting the rounding carry reach the exponent.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))
    rounded >>= 16
    is_nan = np.isnan(values)
    if is_nan.any():
        rounded[is_nan] = (bits[is_nan] >> 16) | 0x40
    return rounded.astype(np.uint16)


def _header(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, shape in shapes.items():
        end = begin + 2 * int(np.prod(shape))
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    # Data starts on an 8-byte boundary: the format pads the header with spaces.
    return text + b" " * (-len(text) % 8)


def write_bfloat16_file(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    load: Callable[[str], NDArray[np.float32]],
    *,
    wrote: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write one safetensors file holding the tensors of `shapes` in its order.

    `load(name)` gives a tensor's float32 values when its turn comes, so only one is held at a time; `wrote` is told the
    bytes of each. Format: https://huggingface.co/docs/safetensors. The file is synced to disk before this returns.
    """
    header = _header(shapes)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)))
        file.write(header)
        for name, shape in shapes.items():
            values = load(name)
            if values.shape != shape:
                raise ValueError(f"{name}: loaded {values.shape}, announced {shape}")
            wrote(file.write(to_bfloat16_bits(values).data))
        file.flush()
        os.fsync(file.fileno())

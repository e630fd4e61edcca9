"""Weights in the order in which the kernels read them."""

import contextlib
import mmap
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 64
_WORD_BYTES = 4
_LINE_BYTES = 64
_SLAB_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class PackedWeight:
    inputs: int
    outputs: int
    """Of the product; half of the weight's rows where gates and values are packed together."""
    words: Tensor
    """[panels, inputs in words, PANEL] int32: a float, or two bfloat16 of consecutive inputs, for each output."""
    bias: Tensor | None
    """[panels * PANEL] float32"""


class WeightArena:
    """Packs weights into memory of huge pages, one after the other in the order of use: so is the next one fetched."""

    def __init__(self) -> None:
        self._slab = _slab(_SLAB_BYTES)
        self._used = 0

    def pack(self, weight: Tensor, bias: Tensor | None) -> PackedWeight:
        """weight: [outputs, inputs], bias: [outputs]. Both may be freed afterwards."""
        outputs, inputs = weight.shape
        missing = -outputs % PANEL
        rows = F.pad(weight, (0, 0, 0, missing))
        return PackedWeight(inputs, outputs, self._panels(rows), None if bias is None else _floats(bias, missing))

    def pack_gated(self, gate_up: Tensor, bias: Tensor | None) -> PackedWeight:
        """gate_up: [2 * outputs, inputs], gates then values. Half a panel of gates lies beside its half of values."""
        outputs, inputs = gate_up.shape[0] // 2, gate_up.shape[1]
        missing = -outputs % (PANEL // 2)
        padded = F.pad(gate_up.view(2, outputs, inputs), (0, 0, 0, missing))
        rows = padded.view(2, -1, PANEL // 2, inputs).transpose(0, 1).reshape(-1, inputs)
        if bias is not None:
            bias = F.pad(bias.view(2, outputs), (0, missing)).view(2, -1, PANEL // 2).transpose(0, 1).flatten()
        return PackedWeight(inputs, outputs, self._panels(rows), None if bias is None else _floats(bias, 0))

    def _panels(self, rows: Tensor) -> Tensor:
        per_word = _WORD_BYTES // rows.element_size()
        words = rows.view(rows.shape[0] // PANEL, PANEL, -1, per_word).transpose(1, 2)
        out = self._take(rows.numel() * rows.element_size(), rows.dtype).view(words.shape)
        out.copy_(words)
        return out.view(torch.int32).squeeze(-1)

    def _take(self, num_bytes: int, dtype: torch.dtype) -> Tensor:
        if self._used + num_bytes > len(self._slab):
            self._slab, self._used = _slab(max(num_bytes, _SLAB_BYTES)), 0
        taken = torch.frombuffer(self._slab, dtype=dtype, count=num_bytes // dtype.itemsize, offset=self._used)
        self._used += -(-num_bytes // _LINE_BYTES) * _LINE_BYTES
        return taken


def _slab(num_bytes: int) -> mmap.mmap:
    slab = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them; small pages serve as well
            slab.madvise(mmap.MADV_HUGEPAGE)
    return slab


def _floats(bias: Tensor, missing: int) -> Tensor:
    return F.pad(bias.float(), (0, missing)).contiguous()

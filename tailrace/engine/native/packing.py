"""Weights in the order in which the kernels read them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tailrace.engine.models.quantization import round_weight
from tailrace.host_memory import map_memory

PANEL = 64
_WORD_BYTES = 4
_LINE_BYTES = 64
_SLAB_BYTES = 64 << 20
_OFFSET = 128
"""Added to each int8: the processor's dot product of bytes takes unsigned ones on one side."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    inputs: int
    outputs: int
    """Of the product; half of the weight's rows where gates and values are packed together."""
    words: Tensor
    """[panels, inputs in words, PANEL] int32: a float, two bfloat16 or four bytes of consecutive inputs, by output."""
    bias: Tensor | None
    """[panels * PANEL] float32"""
    scales: Tensor | None = None
    """[panels * PANEL] float32: of each output; the words are of bytes, each with 128 added."""


class WeightArena:
    """Packs weights into memory of huge pages, one after the other in the order of use: so is the next one fetched."""

    def __init__(self, quantization: str = "none") -> None:
        """quantization: "none" or "int8"."""
        self._is_int8 = quantization == "int8"
        self._slab = map_memory(_SLAB_BYTES)
        self._used = 0

    def pack(self, weight: Tensor, bias: Tensor | None) -> PackedWeight:
        """weight: [outputs, inputs], bias: [outputs]. Both may be freed afterwards."""
        return self._packed(len(weight), *_padded(weight, bias))

    def pack_gated(self, gate_up: Tensor, bias: Tensor | None) -> PackedWeight:
        """gate_up: [2 * outputs, inputs], gates then values. Half a panel of gates lies beside its half of values."""
        outputs, inputs = gate_up.shape[0] // 2, gate_up.shape[1]
        missing = -outputs % (PANEL // 2)
        padded = F.pad(gate_up.view(2, outputs, inputs), (0, 0, 0, missing))
        rows = padded.view(2, -1, PANEL // 2, inputs).transpose(0, 1).reshape(-1, inputs)
        if bias is not None:
            bias = F.pad(bias.view(2, outputs), (0, missing)).view(2, -1, PANEL // 2).transpose(0, 1).flatten()
        return self._packed(outputs, rows, bias)

    def _packed(self, outputs: int, rows: Tensor, bias: Tensor | None) -> PackedWeight:
        """rows: [panels * PANEL, inputs]"""
        inputs, floats = rows.shape[1], None if bias is None else bias.float().contiguous()
        if not self._is_int8:
            return PackedWeight(inputs, outputs, self._panels(rows), floats)
        rounded = round_weight(rows)
        # int8 wraps around: adding 128 and flipping the highest bit are the same.
        values = F.pad(rounded.values, (0, -inputs % _WORD_BYTES)) ^ -_OFFSET
        return PackedWeight(inputs, outputs, self._panels(values), floats, rounded.scales)

    def _panels(self, rows: Tensor) -> Tensor:
        per_word = _WORD_BYTES // rows.element_size()
        words = rows.view(rows.shape[0] // PANEL, PANEL, -1, per_word).transpose(1, 2)
        out = self._take(rows.numel() * rows.element_size(), rows.dtype).view(words.shape)
        out.copy_(words)
        return out.view(torch.int32).squeeze(-1)

    def _take(self, num_bytes: int, dtype: torch.dtype) -> Tensor:
        if self._used + num_bytes > len(self._slab):
            self._slab, self._used = map_memory(max(num_bytes, _SLAB_BYTES)), 0
        taken = torch.frombuffer(self._slab, dtype=dtype, count=num_bytes // dtype.itemsize, offset=self._used)
        self._used += -(-num_bytes // _LINE_BYTES) * _LINE_BYTES
        return taken


def _padded(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """To whole panels."""
    missing = -len(weight) % PANEL
    return F.pad(weight, (0, 0, 0, missing)), None if bias is None else F.pad(bias, (0, missing))

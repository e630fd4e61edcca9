"""Linear layers: packed once for oneDNN on CPUs that have it for the dtype, plain otherwise."""

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_log = logging.getLogger(__name__)

Linear = Callable[[Tensor], Tensor]
"""[rows, inputs] -> [rows, outputs]"""
LinearMaker = Callable[[Tensor, Tensor | None], Linear]
"""(weight [outputs, inputs], bias [outputs] or None) -> Linear. The weight may be freed afterwards."""


class PlainLinear:
    """x W^T + b, by torch's own choice of routine."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


class PackedLinear:
    """x W^T + b with the weight reordered once into oneDNN's blocked format.

    Measured on SmolLM2-135M shapes, one thread, AVX-512 with bf16: 1.0 to 2.0 times F.linear's speed in bfloat16 (most
    at one row), and 2.4 times in float32 from 16 rows on.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return out


class WideLinear:
    """x W^T of a narrow dtype in float32, on CUDA devices: its sums are not rounded, so that no best ones tie by it."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.t()

    def __call__(self, x: Tensor) -> Tensor:
        return torch.mm(x, self._weight, out_dtype=torch.float32)


def can_widen(dtype: torch.dtype, device: torch.device) -> bool:
    """Tries it on a small product: the build of torch decides."""
    if device.type != "cuda" or dtype == torch.float32:
        return False
    try:
        ones = torch.ones(16, 16, dtype=dtype, device=device)
        return bool((WideLinear(ones)(ones) == 16).all())
    except (RuntimeError, TypeError) as error:
        _log.warning("this build of torch has no product of %s in float32 (%s): CUDA graphs need one", dtype, error)
        return False


def linear_maker(dtype: torch.dtype, device: torch.device) -> LinearMaker:
    """The fastest kind of linear layer here; warns once, loudly, when a CPU has to go without packing."""
    if device.type != "cpu":
        return PlainLinear
    if can_pack(dtype):
        return PackedLinear
    _log.warning(
        "this CPU or build of torch has no oneDNN for %s: linear layers run unpacked and several times slower; "
        "--dtype float32 may be faster here",
        dtype,
    )
    return PlainLinear


def can_pack(dtype: torch.dtype) -> bool:
    """Tries it on a small layer: the build decides whether the operators exist, the processor whether they work."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    supported = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    try:
        if dtype in supported and not getattr(torch.ops.mkldnn, supported[dtype])():
            return False
        weight = torch.ones(8, 16, dtype=dtype)
        with torch.inference_mode():
            return bool((PackedLinear(weight, None)(torch.ones(2, 16, dtype=dtype)) == 16).all())
    except (AttributeError, RuntimeError):
        return False

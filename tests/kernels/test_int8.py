"""Products with int8 weights: against exact integers, bit for bit, as built for this processor and for lesser ones."""

import ctypes
import platform
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tailrace.checkpoint.cache_dir import default_cache_dir
from tailrace.engine.models.decoder import refine_best
from tailrace.engine.models.quantization import round_weight
from tailrace.engine.native import library as native_library
from tailrace.engine.native.decoder import _linear
from tailrace.engine.native.library import NativeLibrary, ProductStruct, RefinementStruct, load_library
from tailrace.engine.native.packing import WeightArena
from tests.helpers.kernels import normal

pytestmark = pytest.mark.kernels

GROUP = 64
SHAPES = [(960, 576), (131, 74), (100, 1536), (64, 4200), (65, 3)]
"""(outputs, inputs): inputs of no whole group, of no whole word, and of more than one slab."""
LESSER = ["x86-64", "x86-64-v3", "skylake-avx512", "alderlake"]


def product(library: NativeLibrary, weight: Tensor, x: Tensor, bias: Tensor | None = None, threads: int = 1) -> Tensor:
    packed = WeightArena("int8").pack(weight, bias)
    linear, out = _linear(packed), torch.full((len(x), len(weight)), torch.nan)
    rounded = torch.full((len(x), library.rounded_bytes(x.shape[1])), 0xFF, dtype=torch.uint8)
    opened = library.open_threads(threads)
    call = ProductStruct(ctypes.pointer(linear), x.data_ptr(), len(x), rounded.data_ptr(), out.data_ptr())
    library.product(opened, ctypes.addressof(call))
    library.close_threads(opened)
    return out


def refine(library: NativeLibrary, logits: Tensor, x: Tensor, weight: Tensor, share: float, threads: int = 1) -> Tensor:
    out, opened = logits.clone(), library.open_threads(threads)
    addresses = out.data_ptr(), *out.shape, x.shape[1], x.data_ptr(), weight.data_ptr()
    call = RefinementStruct(opened, *addresses, share)
    library.refine(ctypes.addressof(call))
    library.close_threads(opened)
    return out


def check_refinement(library: NativeLibrary, vocab: int, dtype: torch.dtype) -> None:
    weight, x = normal(1, vocab, 74).to(dtype), normal(2, 5, 74).to(dtype)
    logits = x.float() @ weight.float().T
    rounded, expected = logits + normal(3, 5, vocab) * 0.1, torch.empty(0)
    rounded[4] -= 100  # the best of a row may be below zero
    for share, threads in ((0.0, 1), (2**-4, 2), (3.0, 1)):
        expected = rounded.clone()
        refine_best(expected, x, weight, share)
        actual = refine(library, rounded, x, weight, share, threads)
        assert torch.equal(actual == rounded, expected == rounded)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
    assert not torch.equal(expected, rounded)


def in_groups(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[1] % GROUP)).unflatten(1, (-1, GROUP))


def exact_product(weight: Tensor, x: Tensor) -> Tensor:
    """The same roundings, with the integer sums in float64, which holds them exactly."""
    rounded, groups = round_weight(weight), in_groups(x.float())
    greatest = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(greatest < 1e-30, 0.0, torch.full_like(greatest, 127.0) / greatest)
    scales = torch.where(greatest < 1e-30, 0.0, greatest / torch.full_like(greatest, 127.0))
    values = (groups * inverse).round()
    sums = torch.einsum("rgk,ogk->rog", values.double(), in_groups(rounded.values.double())).float()
    parts = sums * scales[:, None, :, 0]
    total = torch.zeros_like(parts[..., 0])
    for group in range(parts.shape[-1]):
        total += parts[..., group]
    return total * rounded.scales


def inputs(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    x = normal(rows, rows, width).mul(3)
    x[0, : min(GROUP, width)] = 0
    x[-1] *= torch.logspace(-6, 3, width)
    return x.to(dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("outputs", "width"), SHAPES)
def test_equals_exact_integers(outputs: int, width: int, dtype: str) -> None:
    library, kind = load_library(dtype, default_cache_dir()), getattr(torch, dtype)
    weight = normal(1, outputs, width).to(kind)
    weight[1] = 0
    for rows, threads in ((1, 1), (7, 2), (33, 1)):
        x = inputs(rows, width, kind)
        assert torch.equal(product(library, weight, x, threads=threads), exact_product(weight, x))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="these are x86 processors")
@pytest.mark.parametrize("processor", LESSER)
def test_lesser_processors_give_the_same_bits(processor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if processor == "skylake-avx512" and "avx512bw" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this machine cannot run it")
    if processor == "alderlake" and "avx_vnni" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this machine cannot run it")
    flags = tuple(f"-march={processor}" if flag == "-march=native" else flag for flag in native_library._FLAGS)
    assert flags != native_library._FLAGS
    monkeypatch.setattr(native_library, "_FLAGS", flags)
    lesser = load_library("bfloat16", tmp_path)
    weight = normal(1, 131, 1000).bfloat16()
    for rows in (1, 5, 18):
        x = inputs(rows, 1000, torch.bfloat16)
        assert torch.equal(product(lesser, weight, x), exact_product(weight, x))
    check_refinement(lesser, 131, torch.bfloat16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("vocab", [1, 64, 131, 1000])
def test_the_likeliest_logits_are_computed_again(vocab: int, dtype: str) -> None:
    check_refinement(load_library(dtype, default_cache_dir()), vocab, getattr(torch, dtype))


def test_logits_that_are_no_numbers_are_left_alone() -> None:
    library = load_library("float32", default_cache_dir())
    weight, x = normal(1, 131, 64), normal(2, 3, 64)
    logits = x @ weight.T
    logits[0] = torch.nan
    logits[1, [3, 130]] = torch.nan
    logits[2, 7] = torch.inf
    actual = refine(library, logits, x, weight, 2**-4)
    assert torch.equal(actual.isnan(), logits.isnan())
    torch.testing.assert_close(actual, logits, rtol=1e-5, atol=1e-4, equal_nan=True)


def test_a_row_does_not_depend_on_the_others() -> None:
    library = load_library("bfloat16", default_cache_dir())
    weight, x = normal(1, 192, 576).bfloat16(), inputs(400, 576, torch.bfloat16)
    together = product(library, weight, x)
    for row in (0, 5, 17, 399):
        assert torch.equal(product(library, weight, x[row : row + 1].clone()), together[row : row + 1])
    for rows in range(1, 26):
        assert torch.equal(product(library, weight, x[:rows].clone()), together[:rows]), rows


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_value_stays_in_its_row_and_shows(bad: float) -> None:
    library = load_library("bfloat16", default_cache_dir())
    weight, x = normal(1, 70, 200).bfloat16(), inputs(3, 200, torch.bfloat16)
    expected = exact_product(weight, x)
    x[1, 77] = bad
    actual = product(library, weight, x)
    assert actual[1].isnan().all()
    assert torch.equal(actual[[0, 2]], expected[[0, 2]])


def test_the_bias_is_added() -> None:
    library = load_library("float32", default_cache_dir())
    weight, bias, x = normal(1, 70, 200), normal(2, 70), inputs(3, 200, torch.float32)
    assert torch.equal(product(library, weight, x, bias), exact_product(weight, x) + bias)

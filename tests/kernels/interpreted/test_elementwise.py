"""Norms, the gate, rotation and the write against their specs."""

import pytest
import torch

from tailrace.engine.kernels.kv_write import write_rows
from tailrace.engine.kernels.rms_norm import kernel as norm_kernel
from tailrace.engine.kernels.rms_norm import naive as norm_spec
from tailrace.engine.kernels.rope_kv_write import HeadNorms
from tailrace.engine.kernels.rope_kv_write import kernel as rope_kernel
from tailrace.engine.kernels.rope_kv_write import naive as rope_spec
from tailrace.engine.kernels.silu_mul import kernel as silu_kernel
from tailrace.engine.kernels.silu_mul import naive as silu_spec
from tests.helpers.kernel_grid import BLOCKS, DTYPES, GROUPS, HEAD_DIMS, cases
from tests.helpers.kernels import assert_close, normal, poisoned_memory

pytestmark = pytest.mark.kernels
SIZES = (1, 64, 576, 1000)


@pytest.fixture(autouse=True)
def _poisoned():
    with poisoned_memory():
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_rms_norm(rows, size, dtype):
    x, weight = normal(1, rows, 2 * size)[:, :size], normal(2, size, dtype=dtype)
    for given in (x, x.to(dtype)):
        out = norm_kernel.rms_norm(given, weight, 1e-5)
        assert out.dtype == dtype
        assert_close(out, norm_spec.rms_norm(given, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_add_rms_norm(rows, size, dtype):
    hidden, delta, weight = normal(1, rows, size), normal(2, rows, size, dtype=dtype), normal(3, size, dtype=dtype)
    expected_sum = hidden.clone()
    expected = norm_spec.add_rms_norm(expected_sum, delta, weight, 1e-5)
    assert_close(norm_kernel.add_rms_norm(hidden, delta, weight, 1e-5), expected)
    assert torch.equal(hidden, expected_sum)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 48, 1024, 1500])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_silu_mul(rows, size, dtype):
    gate_up = normal(1, rows, 2 * size, dtype=dtype) * 20
    assert_close(silu_kernel.silu_mul(gate_up), silu_spec.silu_mul(gate_up))


def test_silu_of_extremes_is_finite():
    gate_up = torch.tensor([[-1e4, 1e4, -100.0, 0.0, 1.0, 1.0, 1.0, 1.0]])
    assert silu_kernel.silu_mul(gate_up).tolist() == [[0.0, 1e4, pytest.approx(0.0, abs=1e-40), 0.0]]


@pytest.mark.parametrize(
    ("head_dim", "group", "block", "dtype", "has_norms", "tokens"),
    cases(HEAD_DIMS, GROUPS, BLOCKS, DTYPES, (False, True), (0, 1, 5)),
)
def test_rope_kv_write(head_dim, group, block, dtype, has_norms, tokens):
    angles = normal(1, tokens, 1, head_dim // 2)
    cos, sin = torch.cat((angles.cos(),) * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1)
    qkv = normal(2, tokens, 2 * group + 4, head_dim, dtype=dtype)
    pool = torch.full((7, 3, 2, 2, block, head_dim), torch.nan, dtype=dtype)
    rows = write_rows(pool, torch.tensor([6, 0, 6, 2, 3])[:tokens], torch.tensor([block - 1, 0, 1, 7, 3])[:tokens])
    norms = HeadNorms(normal(3, head_dim, dtype=dtype), normal(4, head_dim, dtype=dtype), 1e-5) if has_norms else None
    expected_qkv, expected_pool = qkv.clone(), pool.clone()
    rope_spec.rope_kv_write(expected_qkv, cos, sin, expected_pool, 1, rows, norms)
    rope_kernel.rope_kv_write(qkv, cos, sin, pool, 1, rows, norms)
    assert_close(qkv, expected_qkv)
    assert torch.equal(pool.isnan(), expected_pool.isnan())
    assert_close(pool.nan_to_num(), expected_pool.nan_to_num())

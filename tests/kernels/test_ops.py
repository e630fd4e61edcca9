"""Each op's launcher against its naive spec, on memory that was NaN before."""

from collections.abc import Iterator

import pytest
import torch

from tailrace.engine.kernels import attention_decode, attention_prefill, kv_write, rms_norm, rope, silu_mul
from tailrace.engine.kernels.attention_decode import naive as decode_spec
from tailrace.engine.kernels.attention_decode.gathered import split_rows
from tailrace.engine.kernels.attention_prefill import naive as prefill_spec
from tests.helpers.kernels import assert_close, kv_pool, normal, poisoned_memory

pytestmark = pytest.mark.kernels
BLOCK = 4
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
HEADS = pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 16), (9, 3, 64), (8, 1, 80), (4, 2, 128)])


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


def test_new_memory_is_poisoned() -> None:
    assert torch.empty(100).isnan().all()
    assert torch.empty_like(torch.ones(3, 5)).isnan().all()


@DTYPES
@pytest.mark.parametrize("shape", [(1, 64), (5, 576), (3, 4, 16), (0, 8)])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = normal(1, *shape, dtype=dtype), normal(2, shape[-1], dtype=dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert_close(rms_norm.rms_norm(x, weight, 1e-5), expected)


@DTYPES
def test_rope_turns_pairs_by_their_angle(dtype: torch.dtype) -> None:
    x = normal(1, 3, 2, 8, dtype=dtype)
    angles = normal(2, 3, 1, 4)
    cos, sin = torch.cat((angles.cos(),) * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1)
    pairs = torch.complex(x[..., :4].float(), x[..., 4:].float()) * torch.polar(torch.ones_like(angles), angles)
    # A view whose rows are not adjacent: how the decoder calls it.
    wide = torch.cat((x, x), dim=1)
    rope.rope_(wide[:, :2], cos, sin)
    assert_close(wide[:, :2], torch.cat((pairs.real, pairs.imag), -1))
    assert torch.equal(wide[:, 2:], x)


@DTYPES
def test_silu_mul(dtype: torch.dtype) -> None:
    gate_up = normal(1, 7, 24, dtype=dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_close(silu_mul.silu_mul(gate_up), gate / (1 + (-gate).exp()) * up)


@DTYPES
def test_kv_write_touches_nothing_else(dtype: torch.dtype) -> None:
    pool = torch.full((6, 3, 2, 2, BLOCK, 8), torch.nan, dtype=dtype)
    keys_values = normal(1, 3, 4, 8, dtype=dtype)
    blocks, offsets = torch.tensor([5, 0, 5]), torch.tensor([3, 0, 1])
    kv_write.kv_write(pool, 1, kv_write.write_rows(pool, blocks, offsets), keys_values)
    for token, (block, offset) in enumerate(zip(blocks, offsets, strict=True)):
        assert torch.equal(pool[block, 1, :, :, offset].flatten(0, 1), keys_values[token])
    assert (~pool.isnan()).sum() == keys_values.numel()


@DTYPES
@HEADS
@pytest.mark.parametrize("window", [0, 1, 6, 1000])
@pytest.mark.parametrize("lengths", [[1], [30], [4, 5, 17, 29], [3, 120, 2, 119, 60]], ids=str)
def test_attention_decode(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, window: int, lengths: list[int]
) -> None:
    pool, tables = kv_pool(lengths, kv_heads, head_dim, dtype, block=BLOCK)
    query = normal(3, len(lengths), heads, head_dim, dtype=dtype)
    given = torch.tensor(lengths)
    rows = attention_decode.decode_rows(pool, tables, given, lengths, window)
    out = attention_decode.attention_decode(query, pool, 1, rows)
    assert_close(out, decode_spec.attention_decode(query.float(), pool.float(), 1, tables, given, window))


@pytest.mark.parametrize(
    ("spans", "max_blocks", "groups"),
    [
        ([3], 10, [[0]]),
        ([3, 3, 3], 100, [[0, 1, 2]]),
        ([1, 8, 2, 7, 4], 100, [[1, 3, 4], [2, 0]]),
        ([5, 5, 5], 10, [[0, 1], [2]]),
        ([50, 50], 10, [[0], [1]]),
    ],
)
def test_rows_of_like_length_are_gathered_together(spans: list[int], max_blocks: int, groups: list[list[int]]) -> None:
    assert split_rows(spans, max_blocks) == groups


@DTYPES
@HEADS
@pytest.mark.parametrize("window", [0, 1, 6, 100])
@pytest.mark.parametrize(("start", "end"), [(0, 1), (0, 150), (1, 2), (13, 90), (64, 128)])
def test_attention_prefill(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, window: int, start: int, end: int
) -> None:
    pool, tables = kv_pool([end], kv_heads, head_dim, dtype, block=BLOCK)
    query = normal(3, end - start, heads, head_dim, dtype=dtype)
    blocks = tables[0, : -(-end // BLOCK)].long()
    own = pool[blocks, 1].permute(0, 3, 1, 2, 4).flatten(0, 1)[start:end].flatten(1, 2)
    span = attention_prefill.chunk_span(pool, tables[0], start, end, window)
    out = attention_prefill.attention_prefill(query, own, pool, 1, span)
    assert_close(out, prefill_spec.attention_prefill(query.float(), pool.float(), 1, tables[0], start, window))

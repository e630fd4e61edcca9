"""The attention kernels against their specs."""

import mmap

import pytest
import torch

from tailrace.engine.kernels import attention_prefill, backend
from tailrace.engine.kernels.attention_decode import attention_decode, decode_rows, kernel
from tailrace.engine.kernels.attention_decode import naive as decode_spec
from tailrace.engine.kernels.attention_prefill import kernel as prefill_kernel
from tailrace.engine.kernels.attention_prefill import naive as prefill_spec
from tailrace.engine.kernels.kv_write import write_rows
from tailrace.engine.kernels.rope_kv_write.kernel import rope_kv_write
from tests.helpers.kernel_grid import BLOCKS, DTYPES, GROUPS, HEAD_DIMS, WINDOWS, cases
from tests.helpers.kernels import assert_close, kv_pool, normal, poisoned_memory

pytestmark = pytest.mark.kernels
LENGTHS = [1, 0, 70]
KV_HEADS = 2


@pytest.fixture(autouse=True)
def _poisoned():
    with poisoned_memory():
        yield


@pytest.mark.parametrize(
    ("head_dim", "group", "block", "dtype", "window", "splits"),
    cases(HEAD_DIMS, GROUPS, BLOCKS, DTYPES, WINDOWS, (1, 3)),
)
def test_decode(head_dim, group, block, dtype, window, splits):
    pool, tables = kv_pool(LENGTHS, KV_HEADS, head_dim, dtype, block=block)
    # Heads of a projection of queries, keys and values: rows are not adjacent.
    query = normal(3, len(LENGTHS), 2 * group + 4, head_dim, dtype=dtype)[:, : 2 * group]
    lengths = torch.tensor(LENGTHS)
    out = kernel.PagedRows(tables, lengths, window, splits).attend(query, pool, 1)
    assert_close(out, decode_spec.attention_decode(query.float(), pool.float(), 1, tables, lengths, window))


@pytest.mark.parametrize(
    ("head_dim", "group", "block", "dtype", "window"), cases(HEAD_DIMS, GROUPS, BLOCKS, DTYPES, WINDOWS)
)
def test_prefill(head_dim, group, block, dtype, window, monkeypatch):
    # Tiles of Ampere: half as large as Hopper's, which `test_prefill_of_several_tiles` has.
    monkeypatch.setattr(prefill_kernel, "_capability", lambda pool: 8)
    ranges = [(0, 1), (30, 65)]
    pool, tables = kv_pool([end for _, end in ranges], 1, head_dim, dtype, block=block)
    tokens = sum(end - start for start, end in ranges)
    query = normal(3, tokens, group + 2, head_dim, dtype=dtype)[:, :group]
    out = prefill_kernel.paged_span(pool, tables, ranges, window).attend(query, query[:, :0], pool, 1)
    begin = 0
    for table, (start, end) in zip(tables, ranges, strict=True):
        own = slice(begin, begin + end - start)
        assert_close(
            out[own], prefill_spec.attention_prefill(query[own].float(), pool.float(), 1, table, start, window)
        )
        begin += end - start


@pytest.mark.parametrize("window", [0, 1, 40])
@pytest.mark.parametrize("start", [0, 16, 130])
@pytest.mark.parametrize(("dtype", "num_tiles"), [(torch.float32, 5), (torch.bfloat16, 2)])
def test_prefill_of_several_tiles(start, window, dtype, num_tiles):
    pool, tables = kv_pool([start + 150], 1, 16, dtype, block=16)
    query = normal(3, 150, 2, 16, dtype=dtype)
    span = prefill_kernel.paged_span(pool, tables, [(start, start + 150)], window)
    assert len(span.tiles) == num_tiles
    out = span.attend(query, query[:, :0], pool, 2)
    assert_close(out, prefill_spec.attention_prefill(query.float(), pool.float(), 2, tables[0], start, window))


@pytest.mark.parametrize("window", [0, 1, 100, 1000])
@pytest.mark.parametrize("splits", [2, 24])
def test_decode_in_more_parts_than_a_row_has(splits, window):
    lengths = torch.tensor([3, 300, 65, 0])
    pool, tables = kv_pool(lengths.tolist(), 1, 16, torch.float32, block=16)
    query = normal(3, 4, 2, 16)
    out = kernel.PagedRows(tables, lengths, window, splits).attend(query, pool, 0)
    assert_close(out, decode_spec.attention_decode(query, pool, 0, tables, lengths, window))
    assert (out[3] == 0).all()


def test_no_rows_and_no_tokens():
    pool, tables = kv_pool([5], 1, 16, torch.float32, block=16)
    query = normal(3, 0, 2, 16)
    rows = kernel.PagedRows(tables[:0], torch.zeros(0, dtype=torch.int64), 0, 2)
    assert rows.attend(query, pool, 0).shape == (0, 2, 16)
    span = prefill_kernel.paged_span(pool, tables[:0], [], 0)
    assert span.attend(query, query[:, :0], pool, 0).shape == (0, 2, 16)


def test_addresses_beyond_32_bits():
    """A pool of more than 2**31 elements, of which one block is ever touched."""
    memory = mmap.mmap(-1, (4 << 30) + (1 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pool = torch.frombuffer(memory, dtype=torch.float16).view(-1, 1, 2, 1, 16, 32)
    last = pool.shape[0] - 1
    qkv = normal(1, 1, 3, 32, dtype=torch.float16)
    write = write_rows(pool, torch.tensor([last]), torch.tensor([15]))
    rope_kv_write(qkv, torch.ones(1, 1, 32), torch.zeros(1, 1, 32), pool, 0, write, None)
    assert torch.equal(pool[last, 0, :, 0, 15], qkv[0, 1:])
    tables, lengths = torch.tensor([[last]], dtype=torch.int32), torch.tensor([16])
    query = normal(2, 1, 1, 32, dtype=torch.float16)
    expected = decode_spec.attention_decode(query, pool, 0, tables, lengths, 0)
    assert_close(kernel.PagedRows(tables, lengths, 0, 1).attend(query, pool, 0), expected)
    span = prefill_kernel.paged_span(pool, tables, [(15, 16)], 0)
    assert_close(span.attend(query, query[:, :0], pool, 0), expected)


def test_launchers_pick_the_kernels_by_device(monkeypatch):
    monkeypatch.setattr(backend, "runs_triton", lambda tensor: True)
    pool, tables = kv_pool([40], 1, 16, torch.float32, block=16)
    rows = decode_rows(pool, tables, torch.tensor([40]), [40], 0)
    assert isinstance(rows, kernel.PagedRows)
    query = normal(3, 1, 2, 16)
    expected = decode_spec.attention_decode(query, pool, 0, tables, torch.tensor([40]), 0)
    assert_close(attention_decode(query, pool, 0, rows), expected)
    span = attention_prefill.chunk_span(pool, tables[0], 39, 40, 0)
    assert isinstance(span, prefill_kernel.PagedSpan)
    assert_close(attention_prefill.attention_prefill(query, query, pool, 0, span), expected)


@pytest.mark.parametrize(
    ("programs", "tokens", "processors", "splits"),
    [(1, 128, 132, 1), (1, 1 << 17, 132, 64), (8, 1 << 17, 132, 33), (512, 1 << 17, 132, 1), (8, 1024, 132, 8)],
)
def test_parts_fill_the_device_and_no_more(programs, tokens, processors, splits):
    assert kernel.num_splits(programs, tokens, processors) == splits

"""The pool's memory: there before a step needs it, and otherwise left alone."""

import re
from pathlib import Path

import pytest
import torch

from tailrace import host_memory
from tailrace.engine.kv_cache import KVCache
from tests.helpers.values import make_layout


def resident_bytes(address: int) -> int:
    """Of the mapping that begins there."""
    smaps = Path("/proc/self/smaps").read_text()
    found = re.search(rf"^{address:x}-.*?^Rss: +(\d+) kB", smaps, re.MULTILINE | re.DOTALL)
    assert found is not None
    return int(found[1]) * 1024


@pytest.fixture
def cache() -> KVCache:
    layout = make_layout()
    return KVCache(layout, (7 << 20) // layout.block_bytes, torch.device("cpu"))


def test_touching_goes_on_piece_by_piece_until_all_of_it_is_there(cache: KVCache) -> None:
    if resident_bytes(cache.address) or not cache.touch_more():
        pytest.skip("this kernel cannot give memory ahead")
    assert 0 < resident_bytes(cache.address) < 7 << 20
    cache.tensor[3] = 5
    pieces = 2
    while cache.touch_more():
        pieces += 1
    assert pieces == 4
    assert resident_bytes(cache.address) >= cache.num_blocks * cache.block_bytes
    assert (cache.tensor[3] == 5).all()
    assert not cache.tensor[:3].any()
    assert not cache.touch_more()


def test_where_the_kernel_cannot_nothing_happens(cache: KVCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_populate", lambda *_: False)
    assert not cache.touch_more()
    assert not cache.touch_more()
    assert not cache.tensor.any()


def test_a_device_has_its_memory_already() -> None:
    cache = KVCache(make_layout(), 2, torch.device("meta"))
    assert not cache.touch_more()

import mmap
import re
from pathlib import Path

import numpy as np
import pytest

from tailrace.host_memory import map_memory

NUM_BYTES = 4 << 20


def flags_of(address: int) -> list[str]:
    """Of the mapping in which the address lies; the kernel joins mappings that are alike. Empty where it says none."""
    lies_inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            lies_inside = int(found[1], 16) <= address < int(found[2], 16)
        elif lies_inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


def test_it_is_page_aligned_zeroed_and_writable():
    memory = map_memory(NUM_BYTES)
    values = np.frombuffer(memory, dtype=np.uint8)
    assert len(memory) == values.size == NUM_BYTES
    assert values.ctypes.data % mmap.PAGESIZE == 0
    assert not values.any()
    values[-1] = 7
    assert memory[-1] == 7


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="this kernel does not describe mappings")
def test_huge_pages_are_asked_for_where_there_are_any():
    values = np.frombuffer(map_memory(NUM_BYTES), dtype=np.uint8)
    if not (flags := flags_of(values.ctypes.data)):
        pytest.skip("this kernel does not say what was asked for")
    assert ("hg" in flags) == Path("/sys/kernel/mm/transparent_hugepage").exists()


def test_a_kernel_without_huge_pages_gives_small_ones(monkeypatch):
    class Old(mmap.mmap):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Old)
    memory = map_memory(NUM_BYTES)
    memory[:2] = b"ok"
    assert (len(memory), memory[:2]) == (NUM_BYTES, b"ok")


def test_no_bytes_are_refused():
    with pytest.raises(OSError, match="Invalid argument"):
        map_memory(0)

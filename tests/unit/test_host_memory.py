import mmap
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tailrace.host_memory import FirstTouch, lock_memory, map_memory, residence_of

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


def may_lock() -> bool:
    """CAP_IPC_LOCK: whatever the limit is."""
    found = re.search(r"^CapEff:\s+(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    return found is not None and bool(int(found[1], 16) & 1 << 14)


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


def test_what_is_touched_is_there_in_huge_pages_and_locked_where_that_is_allowed():
    mapping = map_memory(4 * NUM_BYTES)
    memory = memoryview(mapping)
    if residence_of(memory) is None:
        pytest.skip("this kernel does not describe mappings")
    why_not = lock_memory(memory)
    touch = FirstTouch(mapping)
    while touch.more():
        pass
    found = residence_of(memory)
    if found.present < len(memory):
        pytest.skip("this kernel cannot give memory ahead")
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if huge.exists() and "[never]" not in huge.read_text():
        assert found.huge >= len(memory) // 2, "the ends may lie in small pages"
    assert found.locked == (0 if why_not else len(memory))
    if may_lock():
        assert why_not == ""


def test_memory_that_may_not_be_locked_serves_all_the_same():
    """In a process without privileges."""
    script = """
import os, resource
from tailrace.host_memory import lock_memory, map_memory, residence_of
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
if os.geteuid() == 0:
    os.setuid(65534)
mapping = map_memory(4 << 20)
print(lock_memory(memoryview(mapping)))
mapping[:2] = b"ok"
print(mapping[:2])
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    why_not, content = ended.stdout.splitlines()
    assert (why_not, content) == ("Cannot allocate memory (this process may lock 65536 bytes, see ulimit -l)", "b'ok'")

"""A store's memory is there before its first blocks, and what lies in it is left alone."""

import re
import threading
from pathlib import Path

import pytest

from tailrace.kvstore.store import KvStore
from tailrace.kvstore.warming import Warming
from tailrace.transfer.memory import address_of
from tests.helpers.stores import bytes_of, chain_of, num_found, put

BLOCK_BYTES = 64 << 10
NUM_SLOTS = 256
A = chain_of("a", 8)


def resident_bytes(store: KvStore) -> int:
    """Of the mapping in which the memory tier lies."""
    address = address_of(store.view)
    for head, body in re.findall(
        r"^([0-9a-f]+-[0-9a-f]+) .*\n((?:[A-Z].*\n)+)", Path("/proc/self/smaps").read_text(), re.M
    ):
        first, last = (int(end, 16) for end in head.split("-"))
        if first <= address < last:
            found = re.search(r"^Rss: +(\d+) kB", body, re.MULTILINE)
            return int(found[1]) * 1024 if found else 0
    return 0


def test_all_of_it_is_there_after_a_while_and_blocks_that_came_meanwhile_are_whole() -> None:
    store = KvStore(BLOCK_BYTES, NUM_SLOTS)
    put(store, A[:4])
    before = resident_bytes(store)
    warming = Warming(store.first_touch)
    put(store, A)
    assert warming.wait(30)
    if resident_bytes(store) == before:
        pytest.skip("this kernel cannot give memory ahead")
    assert resident_bytes(store) >= BLOCK_BYTES * NUM_SLOTS
    assert num_found(store, A) == 8
    store.slot_bytes(0)[:] = bytes_of(A[0], BLOCK_BYTES)


def test_it_can_be_stopped_in_the_middle() -> None:
    began, goes_on = threading.Event(), threading.Event()

    class Endless:
        num_pieces = 0

        def more(self) -> bool:
            self.num_pieces += 1
            began.set()
            goes_on.wait(5)
            return True

    touch = Endless()
    warming = Warming(touch)  # type: ignore[arg-type]
    assert began.wait(5)
    goes_on.set()
    warming.stop()
    warming.stop()
    assert warming.wait(0)

"""Real files that are damaged, cut short, full or dead: the disk tier loses blocks, the store never lies."""

import errno
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tailrace.kvstore.slab_file import ENTRY_BYTES, Entry, SlabFile, open_slab
from tailrace.kvstore.slab_header import HEADER_BYTES, PAGE
from tailrace.kvstore.store import KvStore
from tests.helpers.stores import PAGED, chain_of, make_store, num_found, put, put_written
from tests.helpers.values import make_layout

LAYOUT = make_layout(**PAGED)
DATA_OFFSET = HEADER_BYTES + -(-ENTRY_BYTES * 64 // PAGE) * PAGE
A, B, C = chain_of("a", 4), chain_of("b", 4), chain_of("c", 4)


def opened(path: Path, slots: int = 16) -> KvStore:
    return make_store(path, slots=slots, disk_slots=64, layout=LAYOUT)


def filled(path: Path) -> None:
    """A closed file with chains A and B."""
    store = opened(path)
    put_written(store, A)
    put_written(store, B)
    store.close()


@contextmanager
def open_slab_at(path: Path) -> Iterator[SlabFile]:
    slab = open_slab(path, 64, LAYOUT)
    yield slab
    slab.close()


def slot_of(store: KvStore, block_hash: bytes) -> int:
    slot = store._blocks[block_hash].disk_slot
    assert slot is not None
    return slot


def damage(path: Path, offset: int, size: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        old = file.read(size)
        file.seek(offset)
        file.write(bytes(byte ^ 0x10 for byte in old))


def test_a_flipped_bit_is_dropped_counted_and_never_served(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(tmp_path / "slab")
    store = opened(tmp_path / "slab")
    slot = slot_of(store, A[2])
    damage(tmp_path / "slab", DATA_OFFSET + slot * LAYOUT.block_bytes + 777)
    assert num_found(store, A) == 2
    assert store.counters.dropped_corrupt == 1
    assert f"{A[2].hex()} in slot {slot} is corrupt" in caplog.text
    assert num_found(store, B) == 4
    store.check_integrity()
    assert [piece.block_hash for piece in store.wanted(A)] == [A[2]]
    put_written(store, A)
    assert num_found(store, A) == 4
    store.close()


def test_a_dropped_block_stays_away_after_a_restart(tmp_path: Path) -> None:
    filled(tmp_path / "slab")
    store = opened(tmp_path / "slab")
    corrupt = slot_of(store, A[0])
    damage(tmp_path / "slab", DATA_OFFSET + corrupt * LAYOUT.block_bytes)
    assert num_found(store, A) == 0
    rewritten = slot_of(store, B[0])
    damage(tmp_path / "slab", DATA_OFFSET + rewritten * LAYOUT.block_bytes)
    assert num_found(store, B) == 0
    put_written(store, C[:1])
    assert slot_of(store, C[0]) == rewritten, "the slot that was given up last"
    store.close()
    again = opened(tmp_path / "slab")
    assert (again.counters.restored, again.counters.restored_bad) == (7, 0)
    assert num_found(again, C) == 1
    assert corrupt not in again.disk.slots.blocks()  # type: ignore[union-attr]
    again.close()


@pytest.mark.parametrize("offset", [0, 20, 40, 101])
def test_a_damaged_entry_is_dropped_and_counted(tmp_path: Path, offset: int) -> None:
    filled(tmp_path / "slab")
    damage(tmp_path / "slab", HEADER_BYTES + offset)
    store = opened(tmp_path / "slab")
    assert (store.counters.restored, store.counters.restored_bad) == (7, 1)
    assert num_found(store, A) + num_found(store, B) < 8
    store.close()


def test_an_entry_that_leaves_no_moment_for_what_comes_is_dropped(tmp_path: Path) -> None:
    """Its checksum fits: nobody's bit has flipped, somebody wrote it so."""
    filled(tmp_path / "slab")
    with open_slab_at(tmp_path / "slab") as slab:
        entries, _ = slab.entries()
        slab.describe(0, replace(entries[0], moment=(1 << 64) - 1))
        slab.describe(1, replace(entries[1], moment=1 << 63, depth=(1 << 32) - 1))
    store = opened(tmp_path / "slab")
    assert (store.counters.restored, store.counters.restored_bad) == (7, 1)
    put_written(store, C)
    assert store.counters.written == 4
    store.check_integrity()
    store.close()


def test_a_torn_write_is_dropped(tmp_path: Path) -> None:
    """Half of the block is there, as after a loss of power."""
    filled(tmp_path / "slab")
    store = opened(tmp_path / "slab")
    damage(tmp_path / "slab", DATA_OFFSET + slot_of(store, B[3]) * LAYOUT.block_bytes + PAGE, PAGE)
    assert num_found(store, B) == 3
    assert store.counters.dropped_corrupt == 1
    store.close()


def test_a_file_that_was_cut_short_keeps_what_is_left_of_it(tmp_path: Path) -> None:
    filled(tmp_path / "slab")
    os.truncate(tmp_path / "slab", DATA_OFFSET + 3 * LAYOUT.block_bytes + 5)
    store = opened(tmp_path / "slab")
    assert store.counters.restored + store.counters.restored_bad == 8
    assert num_found(store, A) + num_found(store, B) == 3
    put_written(store, C)
    assert num_found(store, C) == 4
    store.check_integrity()
    store.close()


def test_a_file_that_is_cut_short_under_a_running_store_is_never_served(tmp_path: Path) -> None:
    filled(tmp_path / "slab")
    store = opened(tmp_path / "slab")
    os.truncate(tmp_path / "slab", DATA_OFFSET)
    assert num_found(store, A) == 0
    assert num_found(store, B) == 0
    assert store.disk is not None
    assert store.disk.is_on
    store.check_integrity()
    store.close()


def test_random_damage_anywhere_behind_the_header_is_never_served(tmp_path: Path) -> None:
    rng = random.Random(2)
    for _ in range(20):
        (tmp_path / "slab").unlink(missing_ok=True)
        filled(tmp_path / "slab")
        size = DATA_OFFSET + 8 * LAYOUT.block_bytes
        damage(tmp_path / "slab", rng.randrange(HEADER_BYTES, size), rng.choice((1, 100, 5000)))
        store = opened(tmp_path / "slab")
        assert num_found(store, A) + num_found(store, B) <= 8
        store.check_integrity()
        store.close()


def test_a_writer_killed_in_the_middle_leaves_a_file_that_opens(tmp_path: Path) -> None:
    """What it said was written is there, and nothing that is there is wrong (`num_found` compares the bytes)."""
    path = tmp_path / "slab"
    for _ in range(3):
        process = start_writer(path)
        assert process.stdout is not None
        said = [int(process.stdout.readline()) for _ in range(40)]
        process.kill()
        process.wait()
        process.stdout.close()
        store = opened(path)
        assert store.counters.restored >= 4 * 8
        assert store.counters.restored_bad == 0
        found = [num_found(store, chain_of(f"chain{number}", 4)) for number in said[-6:]]
        assert sum(found) >= 4 * 4
        assert store.counters.dropped_corrupt == 0
        store.check_integrity()
        store.close()


def test_writes_that_the_disk_has_no_room_for_turn_the_tier_off_and_memory_goes_on(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for a thin disk that is full: the file was made, and its blocks cannot be written."""
    process = start_writer(tmp_path / "slab", DATA_OFFSET + 10 * LAYOUT.block_bytes)
    output, log = process.communicate(timeout=30)
    *_, why, books = output.splitlines()
    assert "slab cannot be written: [Errno" in why
    assert books == "4 of memory, free=4 cached=12"
    assert log.count("the disk tier is off") == 1
    again = opened(tmp_path / "slab")
    assert again.counters.restored == 10
    again.close()


def test_a_disk_without_room_for_the_file_says_so_and_keeps_none_of_it(tmp_path: Path) -> None:
    with tiny_file_system(tmp_path, num_bytes=1 << 20) as directory:
        with pytest.raises(OSError, match="No space left") as failure:
            open_slab(directory / "slab", 4096, LAYOUT)
        assert failure.value.errno == errno.ENOSPC
        assert (directory / "slab").stat().st_blocks * 512 <= HEADER_BYTES
        open_slab(directory / "other", 16, LAYOUT).close()


def test_a_read_only_file_system_is_an_error_of_the_disk(tmp_path: Path) -> None:
    with tiny_file_system(tmp_path, num_bytes=1 << 20) as directory:
        open_slab(directory / "slab", 16, LAYOUT).close()
        subprocess.run(["mount", "-o", "remount,ro", str(directory)], check=True)
        with pytest.raises(OSError, match="Read-only") as failure:
            open_slab(directory / "slab", 16, LAYOUT)
        assert failure.value.errno == errno.EROFS


@pytest.mark.parametrize("fails", ["read", "write"])
def test_a_disk_that_fails_turns_the_tier_off(tmp_path: Path, caplog: pytest.LogCaptureFixture, fails: str) -> None:
    """The file's descriptors come to mean this process's own memory at addresses where there is none: EIO."""
    filled(tmp_path / "slab")
    store = opened(tmp_path / "slab", slots=8)
    assert store.disk is not None
    put_written(store, C)
    file = store.disk.file
    for fd in {file._fd, file._data_fd}:
        dead = os.open("/proc/self/mem", os.O_RDWR)
        os.dup2(dead, fd)
        os.close(dead)
    if fails == "read":
        assert num_found(store, A) == 0
    else:
        put(store, chain_of("new", 2))
        store.flush(5.0)
    assert "Errno 5" in store.disk.why_off
    assert caplog.text.count("the disk tier is off") == 1
    while store.ledger().disk.lent:
        store.pump(0.05)  # reads beside the one that failed first
    store.check_integrity()
    assert store.ledger().disk.free == 64
    assert num_found(store, C) >= 2
    assert num_found(store, B) == 0
    put(store, B)
    assert num_found(store, B) == 4
    store.close()


def test_a_store_that_ends_on_a_slow_disk_writes_for_so_long_and_says_what_it_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(tmp_path / "slab")
    assert store.disk is not None
    file = store.disk.file
    write = file.write

    def write_slowly(slot: int, entry: Entry, data: memoryview) -> int:
        threading.Event().wait(0.05)
        return write(slot, entry, data)

    file.write = write_slowly  # type: ignore[method-assign]
    chain = chain_of("long", 16)
    put(store, chain)
    store.pump()
    store.borrow(chain).close()
    store.close(0.2)
    assert f"no time to write {16 - store.counters.written} blocks" in caplog.text
    again = opened(tmp_path / "slab")
    assert 4 <= again.counters.restored == store.counters.written <= 12
    assert all(block.uses == store._blocks[name].uses for name, block in again._blocks.items()), "all are described"
    again.close()


def start_writer(path: Path, *limit: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.helpers.store_writer", str(path), *map(str, limit)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE if limit else None, text=True)


@contextmanager
def tiny_file_system(where: Path, num_bytes: int) -> Iterator[Path]:
    directory = where / "tiny"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(directory)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs privileges")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)

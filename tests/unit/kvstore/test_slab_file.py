"""Which files a store takes, and which it refuses, by name and untouched."""

from pathlib import Path

import pytest

from tailrace.errors import ConfigError, LayoutMismatchError
from tailrace.kv.layout import LayerGroup
from tailrace.kvstore.slab_file import Entry, SlabFile, checksum_of, open_slab
from tailrace.kvstore.slab_header import MAGIC, peek
from tests.helpers.stores import PAGED, bytes_of, chain_of
from tests.helpers.values import make_layout

LAYOUT = make_layout(**PAGED)
NAMES = chain_of("a", 4)


def made(path: Path, num_slots: int = 4, **fields: object) -> SlabFile:
    return open_slab(path, num_slots, make_layout(**{**PAGED, **fields}))


def entry_of(name: bytes, **fields: object) -> Entry:
    return Entry(**{"block_hash": name, "depth": 3, "tenant": "t\u00e9", "moment": 7, "uses": 2, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize("fields", [{}, {"head_dim": 4}], ids=["direct", "through a bounce buffer"])
def test_what_was_written_is_read(tmp_path: Path, fields: dict[str, int]) -> None:
    slab = made(tmp_path / "slab", **fields)
    data = bytearray(bytes_of(NAMES[0], slab.block_bytes))
    checksum = slab.write(2, entry_of(NAMES[0]), memoryview(data))
    assert checksum == checksum_of(NAMES[0], memoryview(data))
    target = bytearray(slab.block_bytes)
    assert slab.read(2, NAMES[0], checksum, memoryview(target))
    assert target == data
    assert slab.entries() == ({2: entry_of(NAMES[0], checksum=checksum)}, 0)
    assert not slab.read(1, NAMES[0], checksum, memoryview(target))
    assert not slab.read(2, NAMES[1], checksum, memoryview(target))
    slab.clear(2)
    assert slab.entries() == ({}, 0)
    slab.close()


def test_all_of_the_room_is_taken_at_once(tmp_path: Path) -> None:
    slab = made(tmp_path / "slab", 64)
    about = (tmp_path / "slab").stat()
    assert about.st_size == slab.num_bytes
    assert about.st_blocks * 512 >= slab.num_bytes
    slab.close()


def test_of_two_copies_of_a_block_the_later_one_counts(tmp_path: Path) -> None:
    slab = made(tmp_path / "slab")
    data = memoryview(bytearray(slab.block_bytes))
    for slot, moment in ((0, 5), (1, 9), (2, 8)):
        slab.write(slot, entry_of(NAMES[0], moment=moment), data)
    found, num_bad = slab.entries()
    assert (list(found), num_bad) == ([1], 0)
    slab.close()


def test_two_stores_on_one_file_are_refused(tmp_path: Path) -> None:
    slab = made(tmp_path / "slab")
    with pytest.raises(ConfigError, match="slab: another store has it open"):
        made(tmp_path / "slab")
    slab.close()
    made(tmp_path / "slab").close()


@pytest.mark.parametrize("content", [b"#!/bin/sh\n", b"\0" * 40_000, MAGIC[:9]], ids=["text", "zeros", "half a magic"])
def test_a_foreign_file_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "precious"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"precious is refused: it is not a store file .*remove this one") as refusal:
        made(path)
    assert refusal.value.param == "disk_path"
    with pytest.raises(ConfigError, match="it is not a store file"):
        peek(path)
    assert path.read_bytes() == content


def test_an_empty_file_is_taken(tmp_path: Path) -> None:
    (tmp_path / "slab").touch()
    assert peek(tmp_path / "slab") is None
    made(tmp_path / "slab").close()
    header = peek(tmp_path / "slab")
    assert header is not None
    assert (header.layout, header.num_slots) == (LAYOUT, 4)


def test_another_version_is_refused_by_its_number(tmp_path: Path) -> None:
    made(tmp_path / "slab").close()
    before = flip(tmp_path / "slab", len(MAGIC), 3)
    with pytest.raises(ConfigError, match="it has format version 2, and this Tailrace reads version 1"):
        made(tmp_path / "slab")
    assert (tmp_path / "slab").read_bytes() == before


@pytest.mark.parametrize("offset", [20, 60, 200])
def test_a_damaged_header_is_refused(tmp_path: Path, offset: int) -> None:
    made(tmp_path / "slab").close()
    flip(tmp_path / "slab", offset)
    with pytest.raises(ConfigError, match="its header is damaged"):
        made(tmp_path / "slab")


def test_another_layout_is_refused_by_its_fields(tmp_path: Path) -> None:
    made(tmp_path / "slab").close()
    before = (tmp_path / "slab").read_bytes()
    with pytest.raises(LayoutMismatchError, match=r"kv_dtype: owner=float32 needer=bfloat16.*remove this one"):
        made(tmp_path / "slab", kv_dtype="bfloat16")
    with pytest.raises(LayoutMismatchError, match="weights_digest: owner=w1 needer=w2"):
        made(tmp_path / "slab", weights_digest="w2")
    assert (tmp_path / "slab").read_bytes() == before


def test_another_size_is_refused_by_its_slots(tmp_path: Path) -> None:
    made(tmp_path / "slab").close()
    with pytest.raises(ConfigError, match="has 4 slots, and 5 are asked for") as refusal:
        made(tmp_path / "slab", 5)
    assert refusal.value.param == "disk_bytes"


def test_a_layout_comes_back_whole(tmp_path: Path) -> None:
    groups = LayerGroup("full", (0, 2)), LayerGroup("sliding_window", (1,), 32)
    made(tmp_path / "slab", num_layers=3, groups=groups, kv_scales="s", tensor_parallel_size=2).close()
    header = peek(tmp_path / "slab")
    assert header is not None
    assert header.layout.groups == groups
    assert (
        header.layout.fingerprint
        == make_layout(**PAGED, num_layers=3, groups=groups, kv_scales="s", tensor_parallel_size=2).fingerprint
    )


@pytest.mark.parametrize(("name", "reason"), [("missing/slab", "No such file"), (".", "Is a directory")])
def test_a_path_that_no_file_can_have_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        made(tmp_path / name)


def test_what_is_no_regular_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="/dev/null: not a regular file"):
        made(Path("/dev/null"))


@pytest.mark.parametrize("num_slots", [0, 1 << 29])
def test_a_number_of_slots_has_limits(tmp_path: Path, num_slots: int) -> None:
    with pytest.raises(ConfigError, match="1 to 268435456 slots"):
        made(tmp_path / "slab", num_slots)


def flip(path: Path, offset: int, bits: int = 1) -> bytes:
    """Changes bits of one byte; the file's bytes afterwards."""
    content = bytearray(path.read_bytes())
    content[offset] ^= bits
    path.write_bytes(content)
    return bytes(content)

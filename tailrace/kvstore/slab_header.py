"""The first pages of a slab file: what it is, and whether this store may have it."""

import errno
import fcntl
import json
import os
import stat
import struct
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

from tailrace.errors import ConfigError, LayoutMismatchError
from tailrace.kv.layout import KVLayout, LayerGroup

MAGIC = b"TAILRACE-KVSTORE"
VERSION = 1
PAGE = 4096
"""Of what O_DIRECT asks for, the most that is common: offsets, lengths and addresses are multiples of it."""
HEADER_BYTES = 4 * PAGE
MAX_SLOTS = 1 << 28
_HEAD = struct.Struct("<16sIIQI")
"""magic, version, number of slots, bytes of a block, bytes of the layout's text; then the text; then the CRC of all."""
_CRC = struct.Struct("<I")
_MISTAKES = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)


@dataclass(frozen=True, slots=True)
class SlabHeader:
    layout: KVLayout
    num_slots: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_slots <= MAX_SLOTS:
            raise ConfigError(f"a store file has 1 to {MAX_SLOTS} slots, not {self.num_slots}", param="disk_bytes")


def claim(path: Path, wanted: SlabHeader) -> tuple[int, SlabHeader]:
    """The file's descriptor, locked until it is closed. An empty file gets `wanted` as its header.

    Raises ConfigError, LayoutMismatchError and OSError as `open_slab` says; the file is then as it was.
    """
    fd = _open(path, os.O_RDWR | os.O_CREAT)
    try:
        _lock(fd, path)
        found = _read(fd, path)
        if found is None:
            os.pwrite(fd, _to_bytes(wanted), 0)
            return fd, wanted
        if differences := found.layout.differences(wanted.layout):
            raise LayoutMismatchError(
                f"store file {path} holds blocks of another layout ({'; '.join(differences)}, the file being the owner)"
                "; name another file, or remove this one"
            )
        if found.num_slots != wanted.num_slots:
            raise ConfigError(
                f"store file {path} has {found.num_slots} slots, and {wanted.num_slots} are asked for; set its size "
                "to what it was, name another file, or remove this one",
                param="disk_bytes",
            )
        return fd, found
    except BaseException:
        os.close(fd)
        raise


def peek(path: Path) -> SlabHeader | None:
    """The header of the file at `path`; None where there is no file, or an empty one.

    Raises ConfigError for a file that is not a store's or of another version, OSError where it cannot be read.
    """
    if not path.exists():
        return None
    fd = _open(path, os.O_RDONLY)
    try:
        return _read(fd, path)
    finally:
        os.close(fd)


def _open(path: Path, flags: int) -> int:
    """A mistake in the path is a ConfigError; whatever else is wrong is the disk's own OSError."""
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno in _MISTAKES:
            raise ConfigError(f"store file {path}: {error.strerror}", param="disk_path") from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ConfigError(f"store file {path}: not a regular file", param="disk_path")
    return fd


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"store file {path}: another store has it open", param="disk_path") from None


def _read(fd: int, path: Path) -> SlabHeader | None:
    packed = os.pread(fd, HEADER_BYTES, 0)
    if not packed:
        return None
    if not packed.startswith(MAGIC):
        raise _refused(path, f"it is not a store file (it begins with {packed[:8]!r})")
    if len(packed) < _HEAD.size:
        raise _refused(path, f"it ends after {len(packed)} bytes")
    _, version, num_slots, block_bytes, num_text = _HEAD.unpack_from(packed)
    if version != VERSION:
        raise _refused(path, f"it has format version {version}, and this Tailrace reads version {VERSION}")
    end = _HEAD.size + num_text
    if end + _CRC.size > len(packed) or _CRC.unpack_from(packed, end)[0] != zlib.crc32(packed[:end]):
        raise _refused(path, "its header is damaged")
    layout = _layout_from(packed[_HEAD.size : end], path)
    if layout.block_bytes != block_bytes:
        raise _refused(path, f"its blocks have {block_bytes} bytes, and its layout says {layout.block_bytes}")
    return SlabHeader(layout, num_slots)


def _to_bytes(header: SlabHeader) -> bytes:
    text = json.dumps(asdict(header.layout), sort_keys=True, separators=(",", ":")).encode()
    if _HEAD.size + len(text) + _CRC.size > HEADER_BYTES:
        raise ConfigError(f"KV layout: its description has {len(text)} bytes, too many for a store file")
    packed = _HEAD.pack(MAGIC, VERSION, header.num_slots, header.layout.block_bytes, len(text)) + text
    return (packed + _CRC.pack(zlib.crc32(packed))).ljust(HEADER_BYTES, b"\0")


def _layout_from(text: bytes, path: Path) -> KVLayout:
    try:
        values = json.loads(text)
        groups = tuple(LayerGroup(g["kind"], tuple(g["layers"]), g["window"]) for g in values.pop("groups"))
        return KVLayout(**values, groups=groups)
    except (ConfigError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise _refused(path, f"its header names no KV layout that this Tailrace knows: {error}") from None


def _refused(path: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"store file {path} is refused: {reason}; name another file, or remove this one", param="disk_path"
    )

"""Where tensors come from: safetensors files, memory-mapped, or random numbers of the right shapes.

Format: https://huggingface.co/docs/safetensors. The header is read and checked here, before torch sees a byte.
"""

import hashlib
import json
import mmap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tailrace.errors import CheckpointError

Progress = Callable[[str, int, int], None]
"""(label, bytes done, bytes in all)"""
Shape = tuple[int, ...]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_MAX_HEADER_BYTES = 100 << 20
_SAMPLE_BYTES = 4096
_DIGEST_BYTES = 16
_DUMMY_SEED = 20_000
_DUMMY_SCALE = 0.02


class TensorSource(Protocol):
    """Tensors by name. `tensor` may be a read-only view of a mapped file: convert or copy it, never write to it."""

    digest: str
    """Hex; equal sources have equal digests."""

    def tensor(self, name: str) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Path
    dtype: str
    shape: Shape
    begin: int
    """Of its bytes in the file."""
    num_bytes: int


class SafetensorsSource:
    """The tensors of one directory.

    Raises CheckpointError: for no safetensors file, a shard that the index names and nobody has, a file that is corrupt
    or truncated, and tensors that are missing, unexpected or of another shape than `shapes` says.
    """

    def __init__(self, directory: Path, shapes: Mapping[str, Shape], *, ignored: Iterable[str] = ()) -> None:
        self._maps: dict[Path, mmap.mmap] = {}
        self._entries: dict[str, _Entry] = {}
        for path in _weight_files(directory):
            self._maps[path] = _map(path)
            self._entries.update(_read_header(path, self._maps[path]))
        _check_names(directory, set(self._entries) - set(ignored), set(shapes))
        for name, shape in shapes.items():
            _check_tensor(name, self._entries[name], shape)
        self.digest = self._digest(shapes)

    def tensor(self, name: str) -> Tensor:
        entry = self._entries[name]
        flat = torch.frombuffer(
            self._maps[entry.path], dtype=_DTYPES[entry.dtype], count=prod(entry.shape), offset=entry.begin
        )
        return flat.view(entry.shape)

    def _digest(self, names: Iterable[str]) -> str:
        """Over each tensor's name, dtype, shape and the first, middle and last 4 KiB of its bytes, in order of names.

        A sample, so that starting costs no full read: a fine-tune changes every matrix, and almost surely its samples.
        How the tensors are spread over files does not matter.
        """
        digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        for name in sorted(names):
            entry = self._entries[name]
            digest.update(json.dumps([name, entry.dtype, entry.shape]).encode())
            content = memoryview(self._maps[entry.path])[entry.begin : entry.begin + entry.num_bytes]
            middle = max(0, entry.num_bytes // 2 - _SAMPLE_BYTES // 2)
            for begin in (0, middle, max(0, entry.num_bytes - _SAMPLE_BYTES)):
                digest.update(content[begin : begin + _SAMPLE_BYTES])
        return digest.hexdigest()


class DummySource:
    """Random tensors: norms of 1, everything else normal and small; the same ones in every process."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self._shapes = shapes
        text = json.dumps(["dummy", _DUMMY_SEED, sorted(shapes.items())])
        self.digest = hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest()

    def tensor(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        seed = int.from_bytes(hashlib.blake2b(f"{_DUMMY_SEED} {name}".encode(), digest_size=6).digest(), "little")
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(_DUMMY_SCALE)


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX_FILE
    if not index.exists():
        if not (directory / SINGLE_FILE).exists():
            raise CheckpointError(
                f"{directory}: has neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors is served"
            )
        return [directory / SINGLE_FILE]
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = sorted({str(name) for name in names})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: has no readable weight_map: {error}") from error
    for name in files:
        if Path(name).name != name:
            raise CheckpointError(f"{index}: weight_map names {name!r}, which is no file of this directory")
    return [directory / name for name in files]


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            # Private and so formally writable: torch warns about read-only memory. Nobody writes.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be mapped: {error}") from error


def _read_header(path: Path, content: mmap.mmap) -> dict[str, _Entry]:
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > min(_MAX_HEADER_BYTES, len(content) - 8):
        raise CheckpointError(f"{path}: truncated or no safetensors file: its header does not fit")
    try:
        header = json.loads(content[8 : 8 + length])
        entries = {name: _entry(path, 8 + length, fields) for name, fields in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: corrupt safetensors header: {error}") from error
    end = max((entry.begin + entry.num_bytes for entry in entries.values()), default=8 + length)
    if end != len(content):
        kind = "truncated" if end > len(content) else "corrupt"
        raise CheckpointError(f"{path}: {kind}: {len(content)} bytes, its header promises {end}")
    return entries


def _entry(path: Path, data: int, fields: Mapping[str, Any]) -> _Entry:
    begin, end = fields["data_offsets"]
    return _Entry(
        path, str(fields["dtype"]), tuple(map(int, fields["shape"])), data + int(begin), int(end) - int(begin)
    )


def _check_names(directory: Path, found: set[str], wanted: set[str]) -> None:
    for kind, names in (("are missing", wanted - found), ("are not part of this architecture", found - wanted)):
        if names:
            listed = ", ".join(sorted(names)[:5])
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise CheckpointError(f"{directory}: tensors {kind}: {listed}{more}")


def _check_tensor(name: str, entry: _Entry, shape: Shape) -> None:
    if entry.dtype not in _DTYPES:
        raise CheckpointError(f"{entry.path}: tensor {name} is {entry.dtype}; served are {', '.join(_DTYPES)}")
    if entry.shape != shape:
        raise CheckpointError(f"{entry.path}: tensor {name} has shape {entry.shape}, config.json asks for {shape}")
    size = _DTYPES[entry.dtype].itemsize
    if entry.num_bytes != prod(shape) * size or entry.begin < 8:
        raise CheckpointError(f"{entry.path}: corrupt: tensor {name} takes {entry.num_bytes} bytes")

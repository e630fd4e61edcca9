"""Reading a GGUF file: metadata with types checked, and dequantised tensors. Every defect is a CheckpointError."""

from pathlib import Path
from typing import Any, TypeVar

import gguf
import numpy as np
from numpy.typing import NDArray

from tailrace.errors import CheckpointError

T = TypeVar("T")

# What the reader of the gguf package raises on a file that ends early or holds nonsense.
_CORRUPT = (ValueError, IndexError, KeyError, OverflowError, TypeError, MemoryError, NotImplementedError)


class GgufFile:
    """Opening raises CheckpointError for a file that is missing, truncated or no GGUF."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        except _CORRUPT as error:
            raise CheckpointError(f"{path} is truncated, corrupt or not a GGUF file: {error}") from error
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    @property
    def tensor_names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    @property
    def keys(self) -> frozenset[str]:
        return frozenset(self._fields)

    def text(self, key: str, default: str | None = None) -> str:
        return self._typed(key, str, default)

    def integer(self, key: str, default: int | None = None) -> int:
        return self._typed(key, int, default)

    def number(self, key: str) -> float:
        """A float32 field as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06."""
        return float(str(np.float32(self._typed(key, float))))

    def texts(self, key: str) -> list[str]:
        return self._elements(key, str)

    def integers(self, key: str) -> list[int]:
        return self._elements(key, int)

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Dequantised to float32, in row-major order: the last dimension is the one a row of weights runs along."""
        stored = self._tensors[name]
        try:
            return np.asarray(gguf.dequantize(stored.data, stored.tensor_type), dtype=np.float32)
        except _CORRUPT as error:
            raise CheckpointError(f"{self.path}: tensor {name} ({stored.tensor_type.name}): {error}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def _typed(self, key: str, kind: type[T], default: T | None = None) -> T:
        if default is not None and key not in self._fields:
            return default
        value = self._contents(key)
        if not isinstance(value, kind):
            raise CheckpointError(f"{self.path}: metadata field {key} is not of type {kind.__name__}")
        return value

    def _elements(self, key: str, kind: type[T]) -> list[T]:
        values = self._typed(key, list)
        if not all(isinstance(value, kind) for value in values):
            raise CheckpointError(f"{self.path}: metadata field {key} is not a list of {kind.__name__}")
        return values

    def _contents(self, key: str) -> Any:
        field = self._fields.get(key)
        if field is None:
            raise CheckpointError(f"{self.path} has no metadata field {key}")
        try:
            return field.contents()
        except _CORRUPT as error:
            raise CheckpointError(f"{self.path}: metadata field {key} is unreadable: {error}") from error

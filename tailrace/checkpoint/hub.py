"""Models of the Hugging Face hub."""

from collections.abc import Callable
from pathlib import Path


def fetch_from_hub(name: str, *, revision: str | None, progress: Callable[[str, int, int], None]) -> Path:
    raise NotImplementedError

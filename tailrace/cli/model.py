"""Fetching a model with its progress on stderr."""

from pathlib import Path

from tailrace.checkpoint.resolve import resolve_model
from tailrace.cli.console import progress_bars, stderr_console


def fetch_model(name: str, revision: str | None = None, cache_dir: Path | None = None) -> Path:
    """The model's directory. Raises CheckpointError, saying what is missing or could not be had."""
    with progress_bars(stderr_console()) as progress:
        return resolve_model(name, revision=revision, progress=progress, cache_dir=cache_dir)

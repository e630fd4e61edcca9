"""Where Tailrace keeps what it can make again: converted models, compiled kernels."""

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/tailrace, or ~/.cache/tailrace. Overruled by the configuration, which passes its own."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification has relative paths ignored.
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "tailrace"

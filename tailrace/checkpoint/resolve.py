"""From what the user calls a model to the directory that holds it."""

import re
from collections.abc import Callable
from pathlib import Path

from tailrace.checkpoint.bundled import BUNDLED_MODELS, bundled_model
from tailrace.checkpoint.cache_dir import default_cache_dir
from tailrace.checkpoint.directory import check_model_directory
from tailrace.checkpoint.hub import fetch_from_hub
from tailrace.errors import CheckpointError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

Progress = Callable[[str, int, int], None]


def resolve_model(
    name: str,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
    cache_dir: Path | None = None,
) -> Path:
    """The directory, in the format of Hugging Face, of the model called `name`.

    `name` is a directory, a bundled model (`smollm2-135m-instruct`, fetched and converted into `cache_dir` at first
    use) or `org/name` on the Hugging Face hub (kept in that library's own cache; `revision` pins a commit, tag or
    branch). `progress` gets (what is going on, bytes done, bytes in all) while something is fetched or converted.
    Raises CheckpointError, saying what is missing or could not be had.
    """
    report = progress or _ignore
    directory = Path(name).expanduser()
    if name and directory.is_dir():
        return check_model_directory(directory)
    if name in BUNDLED_MODELS:
        return bundled_model(name, cache_dir or default_cache_dir(), report)
    if _HUB_NAME.fullmatch(name):
        return check_model_directory(fetch_from_hub(name, revision=revision, progress=report))
    raise CheckpointError(f"no model {name!r}: {_why_not(directory)}", param="model")


def _why_not(directory: Path) -> str:
    if directory.is_file():
        return "it is a file; a model is a directory"
    return f"neither a directory, nor one of {', '.join(sorted(BUNDLED_MODELS))}, nor org/name on the Hugging Face hub"


def _ignore(what: str, done: int, total: int) -> None:
    pass

"""Models of the Hugging Face hub: which files of a repository are wanted, and what its failures mean."""

import fnmatch
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: its transport's, whichever that is
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tqdm import tqdm  # type: ignore[import-untyped]

from tailrace.checkpoint.directory import WEIGHTS_INDEX
from tailrace.errors import CheckpointError

Progress = Callable[[str, int, int], None]

_METADATA = ("config*.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template*")


def wanted_files(names: list[str]) -> list[str]:
    """The files of a repository that serving needs: at its top level, and safetensors as the only weights.

    Repositories often carry the same weights twice (`consolidated.safetensors` beside `model-*.safetensors`): where the
    usual names are there, the others are left out. Pickled weights are never fetched.
    """
    top = [name for name in names if "/" not in name]
    weights = fnmatch.filter(top, "model*.safetensors") or fnmatch.filter(top, "*.safetensors")
    metadata = [name for name in top if any(fnmatch.fnmatchcase(name, pattern) for pattern in _METADATA)]
    return sorted({*weights, *metadata, *(name for name in top if name == WEIGHTS_INDEX)})


def fetch_from_hub(
    name: str,
    *,
    revision: str | None = None,
    progress: Progress,
    endpoint: str | None = None,
    cache_dir: Path | None = None,
) -> Path:
    """The local snapshot of the repository `name` ("org/name") at `revision` (commit, tag or branch; None: main).

    `endpoint` and `cache_dir` default to what huggingface_hub takes from HF_ENDPOINT and HF_HOME. When the hub cannot
    be reached, a snapshot fetched earlier will do. Raises CheckpointError: no such repository or revision, gated,
    no safetensors in it, or unreachable and never fetched.
    """
    try:
        sizes = _listing(name, revision, endpoint)
        files = _servable(name, list(sizes))
        total = sum(sizes[file] for file in files)
        bar = _progress_bar(lambda done: progress("downloading", min(done, total), total))
        # The names are patterns: exact ones, but for characters that no file of a model carries.
        path = snapshot_download(
            name, revision=revision, endpoint=endpoint, cache_dir=cache_dir, allow_patterns=files, tqdm_class=bar
        )
        return Path(path)
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise CheckpointError(_refusal(name, revision, error), param="model") from error
    except (HTTPError, OSError) as error:
        return _cached(name, revision, cache_dir, error)


def _listing(name: str, revision: str | None, endpoint: str | None) -> dict[str, int]:
    """File name -> bytes."""
    info = HfApi(endpoint=endpoint).model_info(name, revision=revision, files_metadata=True)
    return {file.rfilename: file.size or 0 for file in info.siblings or ()}


def _servable(name: str, names: list[str]) -> list[str]:
    """The wanted ones of `names`; refused before a byte is fetched where they cannot make a model."""
    files = wanted_files(names)
    if not any(file.endswith(".safetensors") for file in files):
        raise CheckpointError(f"{name} on the hub has no *.safetensors; no other weights are read", param="model")
    missing = [file for file in ("config.json", "tokenizer.json") if file not in files]
    if missing:
        raise CheckpointError(f"{name} on the hub lacks {', '.join(missing)}", param="model")
    return files


def _refusal(name: str, revision: str | None, error: HfHubHTTPError) -> str:
    match error:
        case GatedRepoError():
            return f"{name} on the hub is gated: ask for access on its page and set HF_TOKEN"
        case RevisionNotFoundError():
            return f"{name} on the hub has no revision {revision!r}"
        case _:
            return f"no model {name!r}: neither a directory here nor on the hub (or private: set HF_TOKEN)"


def _cached(name: str, revision: str | None, cache_dir: Path | None, cause: Exception) -> Path:
    """The snapshot of an earlier run, or a CheckpointError that says why the hub did not do."""
    try:
        files = wanted_files([file.path for file in get_cached_repo_tree(name, revision=revision, cache_dir=cache_dir)])
        path = snapshot_download(
            name, revision=revision, cache_dir=cache_dir, allow_patterns=files, local_files_only=True
        )
        return Path(path)
    except (CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
        message = str(cause).strip() or type(cause).__name__
    response = getattr(cause, "response", None)
    if response is not None and response.status_code in (401, 403):
        raise CheckpointError(
            f"the hub refuses access to {name} (does it exist? is HF_TOKEN set?): {message}", param="model"
        ) from cause
    raise CheckpointError(f"cannot fetch {name} from the hub, and it was not fetched before: {message}") from cause


def _progress_bar(report: Callable[[int], None]) -> type[Any]:
    """A silent progress bar class that reports the bytes of all bars made from it; they count the same bytes."""
    lock = threading.Lock()
    most = 0

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            self._counts_bytes = options.get("unit") == "B"
            options.pop("name", None)
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            nonlocal most
            with lock:
                self.n += n or 0
                if self._counts_bytes and self.n > most:
                    most = int(self.n)
                    report(most)

    return Bar

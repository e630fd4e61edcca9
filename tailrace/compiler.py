"""Compiles C for this machine at first use, and keeps the result."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

_COMPILERS = ("cc", "gcc", "clang")
_TIMEOUT_S = 300
_Library = TypeVar("_Library", bound=ctypes.CDLL)


class NativeUnavailableError(Exception):
    """Compiled code cannot be had here; the message says why and what would help."""


@dataclass(frozen=True, slots=True)
class Source:
    """What becomes one shared library."""

    name: str
    """Of the library, without its suffix."""
    main: Path
    """All files beside it may be included by it."""
    flags: tuple[str, ...]

    def build(self, cache_dir: Path) -> Path:
        """The library, from `cache_dir` or made now. Several processes may do this at once.

        Raises NativeUnavailableError.
        """
        compiler = _compiler()
        path = cache_dir / "native" / f"{self.name}-{self._fingerprint(compiler)}.so"
        if not path.exists():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._compile(compiler, path)
            except OSError as error:
                raise NativeUnavailableError(f"{path.parent} cannot be written: {error}") from None
        return path

    def load(self, kind: Callable[[str], _Library], cache_dir: Path) -> _Library:
        """`kind`: ctypes.CDLL, or PyDLL for functions that keep the interpreter's lock.

        Raises NativeUnavailableError.
        """
        path = self.build(cache_dir)
        try:
            return _load(kind, path)
        except NativeUnavailableError:
            # A file that was cut short by a full disk, say. A directory that forbids execution fails again.
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise NativeUnavailableError(f"{path} cannot be replaced: {error}") from None
            return _load(kind, self.build(cache_dir))

    def _fingerprint(self, compiler: str) -> str:
        """Of everything that the result depends on, so that a cache directory may be shared by machines."""
        parts = [_output([compiler, "--version"]), " ".join(self.flags), _processor()]
        files = sorted(path for path in self.main.parent.iterdir() if path.suffix in (".c", ".h"))
        parts += [f"{path.name}\n{path.read_text()}" for path in files]
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()

    def _compile(self, compiler: str, path: Path) -> None:
        descriptor, temporary = tempfile.mkstemp(suffix=".so", dir=path.parent)
        os.close(descriptor)
        try:
            _output([compiler, *self.flags, "-shared", "-fPIC", str(self.main), "-o", temporary, "-lm"])
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)


def _load(kind: Callable[[str], _Library], path: Path) -> _Library:
    try:
        return kind(str(path))
    except OSError as error:
        raise NativeUnavailableError(f"{path} cannot be loaded: {error}") from None


def _compiler() -> str:
    for name in _COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return found
    raise NativeUnavailableError("there is no C compiler; install gcc or clang (Debian, Ubuntu: apt install gcc)")


@cache
def _processor() -> str:
    """What it is and what it can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    told = ("flags", "Features", "model name", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(told)}))


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailableError(f"{command[0]} cannot be run: {error}") from None
    if done.returncode != 0:
        said = done.stderr.strip()[:500] or f"exit code {done.returncode}"
        raise NativeUnavailableError(f"{command[0]} failed: {said}")
    return done.stdout

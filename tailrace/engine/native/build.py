"""Compiles the kernels for this very processor, and keeps the result."""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

_SOURCE = Path(__file__).parent / "source"
_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = (
    "-std=gnu11",
    "-O3",
    "-march=native",
    # NaN and infinity keep their meaning: masks and bad rows need them.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
    "-pthread",
)
_WIDE_VECTORS = "-mprefer-vector-width=512"
_DTYPE_FLAGS = {"bfloat16": ("-DBFLOAT16",), "float32": ()}
_TIMEOUT_S = 300


class NativeUnavailableError(Exception):
    """The kernels cannot be had here; the message says why and what would help."""


def build_library(dtype: str, cache_dir: Path) -> Path:
    """The compiled kernels for "bfloat16" or "float32", from `cache_dir` or made now.

    Several processes may do this at once. Raises NativeUnavailableError.
    """
    compiler = _compiler()
    flags = (*_flags(), *_DTYPE_FLAGS[dtype])
    path = cache_dir / "native" / f"{dtype}-{_fingerprint(compiler, flags)}.so"
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _compile(compiler, flags, path)
        except OSError as error:
            raise NativeUnavailableError(f"{path.parent} cannot be written: {error}") from None
    return path


def _compiler() -> str:
    for name in _COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return found
    raise NativeUnavailableError("there is no C compiler; install gcc or clang (Debian, Ubuntu: apt install gcc)")


def _flags() -> tuple[str, ...]:
    return (*_FLAGS, _WIDE_VECTORS) if platform.machine() in ("x86_64", "AMD64") else _FLAGS


def _fingerprint(compiler: str, flags: tuple[str, ...]) -> str:
    """Of everything that the result depends on, so that a cache directory may be shared by machines."""
    parts = [_output([compiler, "--version"]), " ".join(flags), _processor()]
    parts += [f"{path.name}\n{path.read_text()}" for path in sorted(_SOURCE.iterdir())]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()


@cache
def _processor() -> str:
    """What it is and what it can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    told = ("flags", "Features", "model name", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(told)}))


def _compile(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    descriptor, temporary = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(descriptor)
    try:
        _output([compiler, *flags, str(_SOURCE / "decoder.c"), "-o", temporary, "-lm"])
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailableError(f"{command[0]} cannot be run: {error}") from None
    if done.returncode != 0:
        said = done.stderr.strip()[:500] or f"exit code {done.returncode}"
        raise NativeUnavailableError(f"{command[0]} cannot compile the kernels: {said}")
    return done.stdout

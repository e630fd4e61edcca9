"""What every benchmark says beside its figures: command, machine, versions, other load; and its statistics."""

import math
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

from tailrace.config import UpConfig
from tailrace.cores import available_cores

PACKAGES = ("tailrace", "torch", "nixl-cu12", "grpcio")


@dataclass(frozen=True, slots=True)
class Spread:
    """The middle and the ends of some measurements of one thing."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float], *, digits: int = 2) -> "Spread":
        return cls(round(statistics.median(values), digits), round(min(values), digits), round(max(values), digits))

    @classmethod
    def of_ms(cls, seconds: Sequence[float]) -> "Spread":
        return cls.of([s * 1e3 for s in seconds])

    def __str__(self) -> str:
        return f"{self.median:.1f} ({self.min:.1f}-{self.max:.1f})"


@dataclass(frozen=True, slots=True)
class Percentiles:
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float], *, digits: int = 2) -> "Percentiles":
        """Zeros for no values: a run in which nothing happened has errors to show, but no times."""
        if not values:
            return cls(0.0, 0.0, 0.0)
        return cls(*(round(percentile(values, share), digits) for share in (0.5, 0.9, 0.99)))

    @classmethod
    def of_ms(cls, seconds: Sequence[float]) -> "Percentiles":
        return cls.of([s * 1e3 for s in seconds])

    def __str__(self) -> str:
        return f"{self.p50:.1f} / {self.p90:.1f} / {self.p99:.1f}"


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank: the smallest value that `share` of the values do not exceed. Raises ValueError for no values."""
    if not values:
        raise ValueError("no values, no percentile")
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def header(benchmark: str, *, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """The first fields of every result. Call it before the measurement: the load is that of the others then."""
    return {
        "benchmark": benchmark,
        "command": " ".join(["tailrace", *sys.argv[1:]]),
        "machine": machine(),
        "versions": {name: _version(name) for name in packages},
    }


def served(config: UpConfig) -> dict[str, str]:
    """What the workers of a benchmark compute with."""
    return {"model": config.model, "dtype": config.dtype, "quantization": config.quantization}


def machine() -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": len(available_cores()),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def print_footer(console: Console, result: dict[str, Any]) -> None:
    about = result["machine"]
    if what := result.get("served"):
        said = "" if what["quantization"] == "none" else f", {what['quantization']} weights"
        console.print(f"{what['model']}, dtype {what['dtype']}{said}", highlight=False)
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    console.print(
        f"{about['processor']}, {about['cores']} cores, load {about['load_before']} before; {versions}", highlight=False
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"

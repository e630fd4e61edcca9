"""What `tailrace doctor` finds out about the machine, before it starts anything."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tailrace.checkpoint.cache_dir import default_cache_dir
from tailrace.cli.cluster import worker_shares
from tailrace.config import UpConfig
from tailrace.cores import Machine, excess_threads, this_machine
from tailrace.transfer.proof import rdma_devices

_MIN_FREE_BYTES = 2 << 30
_HOLD = """
import ctypes, os, sys
nonce = ctypes.create_string_buffer(bytes(range(32)), 32)
print(os.getpid(), ctypes.addressof(nonce), flush=True)
sys.stdin.read()
"""
_READ = """
import sys
from tailrace.transfer.proof import read_process
sys.exit(read_process(int(sys.argv[1]), int(sys.argv[2]), 32) != bytes(range(32)))
"""


class Verdict(StrEnum):
    PASS = "PASS"  # noqa: S105 - not a password
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    verdict: Verdict
    what: str
    detail: str


def machine_findings(config: UpConfig) -> Iterator[Finding]:
    """In the order in which a person would look."""
    yield _python()
    yield _package("torch", needed_for="workers")
    yield _nixl(config)
    yield core_finding(config, this_machine())
    yield _cross_memory_attach()
    yield _rdma(config)
    yield _cache_directory(config.cache_dir or default_cache_dir())


def _python() -> Finding:
    verdict = Verdict.PASS if sys.version_info >= (3, 11) else Verdict.FAIL
    return Finding(verdict, "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _package(name: str, needed_for: str) -> Finding:
    version = _version(name)
    if version:
        return Finding(Verdict.PASS, name, version)
    return Finding(Verdict.FAIL, name, f"not installed; {needed_for} need it: pip install 'tailrace[worker]'")


def _nixl(config: UpConfig) -> Finding:
    if version := _version("nixl-cu12") or _version("nixl"):
        return Finding(Verdict.PASS, "nixl", version)
    verdict = Verdict.FAIL if config.transport == "nixl" else Verdict.WARN
    return Finding(verdict, "nixl", "not installed; KV moves over the stream transport")


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def core_finding(config: UpConfig, machine: Machine) -> Finding:
    """What there is, and whether the compute threads of all workers have a core each."""
    shares = worker_shares(config, machine)
    detail = f"{machine.num_usable} usable"
    if machine.is_limited:
        detail += f" of {len(machine.cores)}: a control group grants the time of {machine.quota:g}"
    threads = ", ".join(str(share.threads) for share in shares)
    detail += f"; compute threads of {len(shares)} workers: {threads}"
    if excess_threads(machine, shares):
        remedy = "fewer workers" if len(shares) > machine.num_usable else "fewer --threads"
        return Finding(Verdict.WARN, "cores", f"{detail}; workers that work at once slow one another ({remedy})")
    return Finding(Verdict.PASS, "cores", detail)


def _cross_memory_attach() -> Finding:
    """Between siblings, as workers are: the kernel lets a parent read its child where it forbids that."""
    why = _read_between_siblings()
    if not why:
        return Finding(Verdict.PASS, "cross-memory attach", "allowed: on this host NIXL reads are one-sided")
    return Finding(Verdict.WARN, "cross-memory attach", f"not allowed ({why}); KV moves over the stream transport")


def _read_between_siblings() -> str:
    """Why it did not work; empty when it did."""
    if not sys.platform.startswith("linux"):
        return "needs Linux"
    holder = subprocess.Popen(  # noqa: S603 - our own interpreter and code
        [sys.executable, "-c", _HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        pid, address = holder.stdout.readline().split() if holder.stdout else ("0", "0")
        command = [sys.executable, "-c", _READ, pid, address]
        reader = subprocess.run(command, capture_output=True, text=True, timeout=30)  # noqa: S603 - as above
        if holder.stdin is not None:
            holder.stdin.close()
    said = reader.stderr.strip().splitlines()
    return (said[-1] if said else "the bytes differ") if reader.returncode else ""


def _rdma(config: UpConfig) -> Finding:
    devices = rdma_devices("all")
    if not devices:
        return Finding(Verdict.PASS, "RDMA devices", "none")
    used = rdma_devices(config.net_device)
    how = f"used: {', '.join(used)}" if used else "none used; name them with --net-device"
    return Finding(Verdict.PASS, "RDMA devices", f"{', '.join(devices)}; {how}")


def _cache_directory(directory: Path) -> Finding:
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    if not os.access(existing, os.W_OK):
        return Finding(Verdict.FAIL, "model cache", f"{directory} cannot be written; choose another with --cache-dir")
    free = shutil.disk_usage(existing).free
    verdict = Verdict.PASS if free >= _MIN_FREE_BYTES else Verdict.WARN
    return Finding(verdict, "model cache", f"{directory}, {free / 1e9:.1f} GB free")

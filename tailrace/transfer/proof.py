"""Is a read between two processes truly one-sided? Asked of the kernel, not of configuration."""

import ctypes
import os
import sys
from functools import cache
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_INFINIBAND = Path("/sys/class/infiniband")


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_READV_ARGUMENTS = (
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
)


@cache
def boot_id() -> str:
    """Equal for two processes of one running kernel; empty where the system does not tell."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""


def rdma_devices(allowed: str) -> tuple[str, ...]:
    """Names of the host's RDMA devices that `allowed`, a value of UCX_NET_DEVICES, lets an agent use."""
    if not _INFINIBAND.is_dir():
        return ()
    names = {entry.partition(":")[0] for entry in allowed.split(",")}
    return tuple(sorted(d.name for d in _INFINIBAND.iterdir() if d.name in names or "all" in names))


def read_process(pid: int, address: int, num_bytes: int) -> bytes:
    """Bytes of another process by process_vm_readv(2). Raises OSError where the kernel forbids or does not know it."""
    if not sys.platform.startswith("linux"):
        raise OSError("cross-memory attach needs Linux")
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(num_bytes)
    local = _IoVec(ctypes.addressof(buffer), num_bytes)
    remote = _IoVec(address, num_bytes)
    libc.process_vm_readv.restype = ctypes.c_ssize_t
    libc.process_vm_readv.argtypes = _READV_ARGUMENTS
    got = libc.process_vm_readv(pid, ctypes.addressof(local), 1, ctypes.addressof(remote), 1, 0)
    if got != num_bytes:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error) if got < 0 else f"{got} of {num_bytes} bytes")
    return buffer.raw

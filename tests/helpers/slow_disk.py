"""A real disk made slow for one process, by the kernel (the blkio controller of cgroups, version 1)."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

_CONTROLLER = Path("/sys/fs/cgroup/blkio")


@contextlib.contextmanager
def slow_disk(pid: int, path: Path, bytes_per_s: int) -> Iterator[None]:
    """What the process reads and writes past the page cache, on the disk of `path`. It must end before the block does.

    Skips the test where the machine does not let us.
    """
    group = _CONTROLLER / f"tailrace-test-{pid}"
    device = path.stat().st_dev
    limit = f"{os.major(device)}:{os.minor(device)} {bytes_per_s}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no disk can be made slow here: {error}")
    try:
        try:
            for kind in ("read", "write"):
                (group / f"blkio.throttle.{kind}_bps_device").write_text(limit)
            (group / "cgroup.procs").write_text(str(pid))
        except OSError as error:
            pytest.skip(f"the disk of {path} cannot be made slow: {error}")
        yield
    finally:
        # A group that still has somebody in it stays; it then ends with the machine.
        with contextlib.suppress(OSError):
            group.rmdir()

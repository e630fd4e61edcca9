"""Which cores this process may use, and how they are divided among workers.

Two compute threads for one core cost more than one thread: what one of them waits for, the other one delays.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PASSIVE_WAITING: Mapping[str, str] = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
"""What makes the threads of GNU's, LLVM's and Intel's OpenMP sleep at once when they have nothing to do."""
_PLACEMENT = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
_POOL_SIZES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_CGROUP = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is to divide."""

    cores: tuple[int, ...]
    """Those that this process may run on."""
    quota: float | None = None
    """CPU seconds a second that a control group grants; None: no limit."""

    @property
    def num_usable(self) -> int:
        """Cores that can be busy all the time; at least one."""
        granted = len(self.cores) if self.quota is None else int(self.quota)
        return max(1, min(len(self.cores), granted))

    @property
    def is_limited(self) -> bool:
        """By time rather than by cores: others may have the same cores, so none of them is ours to keep to."""
        return self.num_usable < len(self.cores)


@dataclass(frozen=True, slots=True)
class Share:
    """One worker's part of the machine."""

    threads: int
    cores: tuple[int, ...] = ()
    """Cores to keep to; empty: any."""


def this_machine() -> Machine:
    return Machine(available_cores(), cpu_quota())


def available_cores() -> tuple[int, ...]:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def divide(machine: Machine, num_workers: int, *, threads: int = 0, pin: bool = True) -> list[Share]:
    """Equal shares, larger ones first; each worker gets `threads` compute threads, or with 0 one a core of its share.

    A worker keeps to cores of its own where all its threads have one there: with more workers than cores, more threads
    than cores or a quota, whoever works takes what is free.
    """
    size, extra = divmod(machine.num_usable, num_workers)
    sizes = [size + (i < extra) for i in range(num_workers)]
    if machine.is_limited or not pin or any(threads > s or s == 0 for s in sizes):
        return [Share(threads or s or 1) for s in sizes]
    rest = list(machine.cores)
    return [Share(threads or s, tuple(rest.pop(0) for _ in range(s))) for s in sizes]


def excess_threads(machine: Machine, shares: Sequence[Share]) -> int:
    """Compute threads beyond the usable cores, when all workers work at once."""
    return max(0, sum(share.threads for share in shares) - machine.num_usable)


def thread_environment(threads: int) -> dict[str, str]:
    """For a process that computes: pools of that size, which sleep when idle, whatever the environment said."""
    return {**PASSIVE_WAITING, **dict.fromkeys(_POOL_SIZES, str(threads))}


def without_thread_placement(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what binds OpenMP's threads to cores: every worker's would be bound to the same ones."""
    return {name: value for name, value in environment.items() if name not in _PLACEMENT}


def cpu_quota(membership: Path = _MEMBERSHIP, root: Path = _CGROUP) -> float | None:
    """The least that a control group of ours grants, in cores; None without control groups or limits.

    Both versions: cpu.max ("200000 100000", "max 100000") and cpu.cfs_quota_us with cpu.cfs_period_us. In a container
    the names in /proc may be those that the host sees; then the group's own files lie at the root.
    """
    grants = [grant for group in _groups(membership, root) if (grant := _grant(group)) is not None]
    return min(grants, default=None)


def _groups(membership: Path, root: Path) -> Iterator[Path]:
    """Every group that bounds this process, each with those above it."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / controllers if controllers else root
        inner = PurePosixPath(name.lstrip("/"))
        for group in (inner, *inner.parents):
            yield mount / group


def _grant(group: Path) -> float | None:
    quota, _, period = _read(group / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
    if not (quota.isdecimal() and period.isdecimal() and int(period)):
        return None
    return int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""

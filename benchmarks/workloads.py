"""What is asked of everybody: which engines, how many prompts, how long, on how many cores."""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.arms import ArmSpec

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "benchmarks" / "peers"
FIRST_ORDINARY_TOKEN = 1000
OWN_ARMS = {"tailrace": "none", "tailrace-int8": "int8"}
"""By name, the quantization of the weights."""


@dataclass(frozen=True, slots=True)
class Workload:
    batch: int
    input: int
    output: int
    with_first: bool = True
    """Ask for one token each as well, so that decode can be told from prefill."""

    def __str__(self) -> str:
        return f"{self.batch} x ({self.input} in, {self.output} out)"

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        draw = random.Random(f"{self} {seed}")
        return [
            [draw.randrange(FIRST_ORDINARY_TOKEN, vocab_size) for _ in range(self.input)] for _ in range(self.batch)
        ]


@dataclass(frozen=True, slots=True)
class Group:
    """Arms that take turns on the same cores, one compute thread a core."""

    cores: tuple[int, ...]
    arms: tuple[ArmSpec, ...]
    workloads: tuple[Workload, ...]
    missing: tuple[str, ...] = ()
    """Peers that are not set up."""

    @property
    def title(self) -> str:
        return f"{len(self.cores)} core{'s' if len(self.cores) > 1 else ''}, as many compute threads"


def plan(model: Path, venvs: Path, cores: Sequence[int]) -> list[Group]:
    """One core for everybody; then two for the one comparison that is asked for with two."""
    one = (Workload(16, 128, 64), Workload(32, 256, 128, with_first=False), Workload(1, 128, 64))
    groups = [_group(model, venvs, tuple(cores[-1:]), tuple(OWN_ARMS), ("vllm", "transformers", "llama"), one)]
    if len(cores) > 1:
        two = (Workload(16, 128, 64),)
        groups.append(_group(model, venvs, tuple(cores[-2:]), ("tailrace",), ("transformers",), two))
    return groups


def _group(
    model: Path,
    venvs: Path,
    cores: tuple[int, ...],
    own: Sequence[str],
    peers: Sequence[str],
    workloads: tuple[Workload, ...],
) -> Group:
    there = [peer for peer in peers if _is_set_up(venvs, peer)]
    arms = (*(_own(name, model, cores) for name in own), *(_peer(peer, venvs, model, cores) for peer in there))
    return Group(cores, arms, workloads, tuple(peer for peer in peers if peer not in there))


def _own(name: str, model: Path, cores: tuple[int, ...]) -> ArmSpec:
    command = (sys.executable, str(PEERS / "tailrace_arm.py"), str(model), str(len(cores)), OWN_ARMS[name])
    return ArmSpec(name, command, cores, {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"})


def _is_set_up(venvs: Path, peer: str) -> bool:
    return (venvs / peer / ".ready").exists()


def _peer(peer: str, venvs: Path, model: Path, cores: tuple[int, ...]) -> ArmSpec:
    subject = str(venvs / "llama" / "model-bf16.gguf") if peer == "llama" else str(model)
    command = (str(venvs / peer / "bin" / "python"), str(PEERS / f"{peer}_arm.py"), subject, str(len(cores)))
    environment = {"HF_HUB_OFFLINE": "1"}
    if peer == "vllm":
        # What its own installation guide asks for, as far as it is there.
        libraries = [venvs / "vllm" / "lib" / "libiomp5.so", Path("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4")]
        environment["LD_PRELOAD"] = ":".join(str(library) for library in libraries if library.exists())
    return ArmSpec(peer, command, cores, environment, max_batch=1 if peer == "llama" else 1 << 30)

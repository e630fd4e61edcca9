"""Kernels compiled for a GPU that is not there, and what the compiler says of them."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tailrace.engine.kernels.launch import Launch

WARP = 32
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


@dataclass(frozen=True, slots=True)
class Resources:
    registers: int
    """A thread."""
    spilled_bytes: int
    """A thread: its stack, which these kernels use for nothing else."""
    shared_bytes: int
    """A program."""
    threads: int


def compile_kernel(kernel: Any, launch: Launch, types: dict[str, str], capability: int, folder: Path) -> Resources:
    """`types`: Triton's types of the parameters that are not constant, which the launcher would read off the tensors.

    Pointers and strides are multiples of 16, as they are for all served shapes. capability: 90 for sm_90.
    """
    names = kernel.arg_names
    assert {name for name in names if name not in launch.constants} == set(types)
    signature = {name: types.get(name, "constexpr") for name in names}
    is_aligned = {name for name, type_ in types.items() if type_.startswith("*") or name.endswith("_stride")}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=dict(launch.constants),
        attrs={(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name in is_aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, WARP), options=launch.options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = _usage(cubin)
    return Resources(usage["REG"], usage["STACK"], compiled.metadata.shared, launch.num_warps * WARP)


def _usage(cubin: Path) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    printed = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", printed)}

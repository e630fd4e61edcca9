"""Kernels and whole models on one CUDA device: checked first, then measured against what the device itself can do.

    python benchmarks/gpu.py [--only checks kernels models graphs handover] [--models Llama-3.1-8B Qwen3-0.6B]

Needs a checkout, torch with CUDA, triton and what loading a model needs (safetensors, tokenizers, huggingface-hub); the
package need not be installed. Weights are random, written nowhere; the 8B model's take minutes to draw. Shares are of
two limits measured in the same run: the bandwidth of a device-to-device copy (bytes read and written), and the rate of
a large bfloat16 matrix product. A section that fails says why, and the others are run all the same.
Exit status: 0, 1 when something differs from its spec or a section failed, 2 when there is no CUDA device.
"""

import argparse
import gc
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks.device.handover import compare_handover
from benchmarks.device.kernels import check_all, kernel_rows, sampling_agrees, sampling_rows
from benchmarks.device.models import compare_graphs, model_rows
from benchmarks.device.peaks import BLOCK, MODELS, Peaks, Shape, cuda_timer, measure_peaks

DEVICE = "cuda"
CONTEXTS = ((64, 1024), (1, 8192), (8, 8192))
"""Rows of a decode step, and the tokens of each."""


def checks(shape: Shape, peaks: Peaks) -> bool:
    agree = check_all(shape, DEVICE)
    return sampling_agrees(shape.vocab, DEVICE) and agree


def kernels(shape: Shape, peaks: Peaks) -> bool:
    for row in kernel_rows(shape, cuda_timer, DEVICE, contexts=CONTEXTS):
        print(row.text(peaks), flush=True)
    for row in sampling_rows(shape.vocab, cuda_timer, DEVICE):
        print(row.text(peaks), flush=True)
    return True


def models(shape: Shape, peaks: Peaks) -> bool:
    for row in model_rows(shape, DEVICE, batch=64, context=1024, prompt=8192):
        print(row.text(peaks), flush=True)
    return True


def graphs(shape: Shape, peaks: Peaks) -> bool:
    return compare_graphs(shape, DEVICE, batch=8, context=1024)


def handover(shape: Shape, peaks: Peaks) -> bool:
    return compare_handover(shape, DEVICE, peaks)


Section = Callable[[Shape, Peaks], bool]
"""Prints its lines; false when something differs from what it must be."""
SECTIONS: Mapping[str, Section] = {
    "checks": checks,
    "kernels": kernels,
    "models": models,
    "graphs": graphs,
    "handover": handover,
}
SHAPES = {shape.name: shape for shape in MODELS}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="MODEL")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu: torch sees no CUDA device here, so nothing was checked or measured", file=sys.stderr)
        return 2
    print(shlex.join(["python", "benchmarks/gpu.py", *(sys.argv[1:] if arguments is None else arguments)]))
    properties = torch.cuda.get_device_properties(0)
    print(f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, triton {version('triton')}")
    print(f"bfloat16, blocks of {BLOCK} tokens; medians")
    with torch.inference_mode():
        peaks = measure_peaks(cuda_timer, DEVICE)
        print(f"copy {peaks.bytes_per_s / 1e9:.0f} GB/s, matrix product {peaks.flops_per_s / 1e12:.0f} TFLOP/s")
        shapes = [SHAPES[name] for name in chosen.models]
        results = [run_section(name, shape, peaks) for shape in shapes for name in SECTIONS if name in chosen.only]
    return 0 if all(results) else 1


def run_section(name: str, shape: Shape, peaks: Peaks, sections: Mapping[str, Section] = SECTIONS) -> bool:
    """False, and why on stderr, when the section fails; what it held of the device is free for the next one."""
    try:
        return sections[name](shape, peaks)
    except Exception as error:  # a boundary: whatever one section raises, the others have their turn
        print(f"gpu: {name} of {shape.name} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return False
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())

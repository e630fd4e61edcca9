"""What of the GPU benchmark can be run without a GPU: its flow, on the CPU, where launchers run the specs."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.device import handover, kernels, models
from benchmarks.device.peaks import Peaks, Row, Shape
from benchmarks.limits import Limits

ROOT = Path(__file__).parents[2]
TINY = Shape("tiny", "Qwen3ForCausalLM", 2, 64, 96, 4, 2, 16, 1024, True)
PEAKS = Peaks(bytes_per_s=1e12, flops_per_s=1e13)


def once(call):
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the benchmark needs")
def test_without_a_device_it_says_so(capsys):
    assert gpu.main(["--only", "kernels"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "no CUDA device" in printed.err


def test_it_runs_from_a_checkout_that_is_not_installed(tmp_path):
    """Everything that is neither the repository's nor at hand on a GPU machine is made impossible to import."""
    script = f"""
import sys
sys.path[:] = [entry for entry in sys.path if entry and entry != {str(ROOT)!r}]
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{"gguf", "grpc", "redis", "fastapi", "pydantic", "typer", "rich", "uvicorn"}}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
sys.argv = ["gpu.py", "--help"]
import runpy
runpy.run_path({str(ROOT / "benchmarks/gpu.py")!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--only SECTION" in done.stdout


def test_a_section_that_fails_says_so_and_leaves_the_others_their_turn(capsys):
    def breaks(shape, limits):
        raise RuntimeError("out of memory")

    sections = {"bad": breaks, "good": lambda shape, limits: True}
    assert [gpu.run_section(name, TINY, PEAKS, sections) for name in sections] == [False, True]
    assert "bad of tiny failed: RuntimeError: out of memory" in capsys.readouterr().err


@torch.inference_mode()
def test_checks_tell_right_from_wrong(capsys, monkeypatch):
    assert kernels.check_all(TINY, "cpu", rows=2, length=40)
    assert kernels.sampling_agrees(TINY.vocab, "cpu", rows=2)
    assert "DIFFERS" not in capsys.readouterr().out
    monkeypatch.setattr(kernels.silu_mul, "silu_mul", lambda gate_up: gate_up[:, : gate_up.shape[1] // 2] + 1)
    assert not kernels.check_all(TINY, "cpu", rows=2, length=40)
    assert "DIFFERS  tiny           silu_mul" in capsys.readouterr().out


@torch.inference_mode()
def test_rows_of_kernels_and_models_name_what_was_measured():
    rows = [
        *kernels.kernel_rows(TINY, once, "cpu", contexts=((2, 32),)),
        *kernels.sampling_rows(TINY.vocab, once, "cpu", rows=2),
        *models.model_rows(TINY, "cpu", batch=2, context=32, prompt=48, steps=4),
    ]
    names = [row.name for row in rows]
    assert {"tiny attention_decode 2 x 32", "sampling penalties, 2 x 1024", "tiny decode 2 x 32"} <= set(names)
    assert all(row.seconds > 0 and (row.num_bytes > 0) != (row.flops > 0) for row in rows)


def test_a_row_stands_beside_what_is_asked_of_it():
    row = Row("decode", seconds=1e-3, num_bytes=0.7e9, asked=Limits(0.65, 0.8))
    assert row.text(PEAKS).endswith("MBU  70.0%  must 0.65, aim 0.8: met")
    assert "must" not in Row("norm", seconds=1e-3, num_bytes=1e9).text(PEAKS)


@torch.inference_mode()
def test_graphs_are_held_against_no_graphs(capsys):
    assert models.compare_graphs(TINY, "cpu", batch=2, context=32, steps=4, rounds=2)
    printed = capsys.readouterr().out
    assert "tiny decode 2 x 32: eager over graphs" in printed
    assert "ok       tiny tokens with and without graphs" in printed


@torch.inference_mode()
def test_a_handover_between_two_processes_gives_the_tokens_of_one(capsys):
    assert handover.compare_handover(TINY, "cpu", PEAKS, prompt=100, steps=6, rounds=1)
    assert "ok       tiny blocks and tokens after a handover" in capsys.readouterr().out


@torch.inference_mode()
def test_a_handover_that_loses_a_block_is_noticed():
    sizes = handover.Sizes(prompt=100, steps=2)
    engine = models.dummy_engine(TINY, "cpu", batch=1, longest=sizes.longest)
    models.prefill(engine, sizes.prompt, longest=sizes.longest)
    expected = engine.cache.tensor[: sizes.blocks].clone()
    with handover.prefiller(TINY, "cpu", sizes) as other:
        assert handover.take(engine, other, sizes, expected).is_exact
        other.pool = other.pool.clone()
        other.pool[3].zero_()
        assert not handover.take(engine, other, sizes, expected).is_exact

"""The benchmark's own code, on kernels in the interpreter and sizes that take no time: only its numbers need a GPU."""

import time

import pytest
import torch

from benchmarks.device.kernels import check_all, kernel_rows, sampling_agrees, sampling_rows
from benchmarks.device.models import model_rows
from benchmarks.device.peaks import Shape, measure_peaks
from tailrace.engine.kernels import backend
from tailrace.engine.kernels.silu_mul import kernel as silu_kernel

pytestmark = pytest.mark.kernels
TINY = (
    Shape("tiny llama", "LlamaForCausalLM", 2, 32, 48, 4, 2, 16, 100, False),
    Shape("tiny qwen", "Qwen3ForCausalLM", 2, 32, 48, 4, 2, 16, 100, True),
)


@pytest.fixture(autouse=True)
def _forced(monkeypatch):
    monkeypatch.setattr(backend, "runs_triton", lambda tensor: True)
    torch.manual_seed(0)


def once(call):
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@pytest.mark.parametrize("shape", TINY, ids=lambda shape: shape.name)
def test_checks_pass_and_fail(shape, capsys, monkeypatch):
    assert check_all(shape, "cpu", rows=2, length=40)
    assert "DIFFERS" not in capsys.readouterr().out
    monkeypatch.setattr(silu_kernel, "silu_mul", lambda given: given.new_full((len(given), 48), torch.nan))
    assert not check_all(shape, "cpu", rows=2, length=40)
    assert "DIFFERS" in capsys.readouterr().out


@pytest.mark.parametrize("shape", TINY, ids=lambda shape: shape.name)
def test_every_row_has_a_share(shape):
    peaks = measure_peaks(once, "cpu", copy_bytes=1 << 20, size=64)
    rows = list(kernel_rows(shape, once, "cpu", contexts=((2, 5), (1, 9))))
    rows += model_rows(shape, "cpu", batch=2, context=6, prompt=9, steps=2)
    assert [row.name.removeprefix(shape.name) for row in rows if "decode" in row.name or "prefill" in row.name] == [
        " attention_decode 2 x 5",
        " attention_decode 1 x 9",
        " attention_prefill 9",
        " prefill 9",
        " decode 1 x 6",
        " decode 2 x 6",
    ]
    rows += sampling_rows(shape.vocab, once, "cpu", rows=2)
    for row in rows:
        assert row.seconds > 0
        assert ("MFU" if row.flops else "MBU") in row.text(peaks)


def test_tokens_drawn_by_kernels_are_held_against_the_spec(capsys, monkeypatch):
    on_device = iter((True, False))
    monkeypatch.setattr(backend, "runs_triton", lambda tensor: next(on_device))
    assert sampling_agrees(100, "cpu", rows=2)
    assert "ok       sampling, 100 tokens: 0 of 8 rows differ" in capsys.readouterr().out

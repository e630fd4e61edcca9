"""These tests run kernels in Triton's interpreter, which a process has for all kernels or for none.

`tests/kernels/test_interpreted.py` starts such a process; by hand: TRITON_INTERPRET=1 pytest tests/kernels/interpreted
"""

import os

import pytest
import torch

IS_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if IS_INTERPRETING else ["test_*.py"]


@pytest.fixture(autouse=True)
def _bfloat16_products(monkeypatch):
    """Triton 3.7's interpreter holds bfloat16 as integers and multiplies these: its products take floats here."""
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != interpreter.tl.bfloat16:
            return handle
        bits = handle.data.astype("uint32") << 16
        return interpreter.TensorHandle(bits.view("float32"), interpreter.tl.float32)

    def create_dot(self, a, b, *rest):
        return plain(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(autouse=True)
def _rounding(monkeypatch):
    """Triton 3.7's interpreter cuts a float32 short to make a bfloat16 of it, where devices round to the nearest."""
    from triton.runtime import interpreter

    plain = interpreter._convert_float

    def convert(values, given, wanted, rounding_mode):
        if (given, wanted) != (interpreter.tl.float32, interpreter.tl.bfloat16):
            return plain(values, given, wanted, rounding_mode)
        floats = torch.from_numpy(values.view("float32"))
        return floats.to(torch.bfloat16).view(torch.int16).numpy().view("uint16")

    monkeypatch.setattr(interpreter, "_convert_float", convert)

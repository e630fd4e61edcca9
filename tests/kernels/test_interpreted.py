"""Runs tests/kernels/interpreted in a process of its own: Triton decides once whether it compiles or interprets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.kernels
FOLDER = Path(__file__).parent / "interpreted"


def run_interpreted(marker: str, seconds: float) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marker, str(FOLDER)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.timeout(600)
def test_every_pair_of_parameters() -> None:
    run_interpreted("not kernels_full", 580)


@pytest.mark.kernels_full
@pytest.mark.timeout(7200)
def test_every_combination_of_parameters() -> None:
    run_interpreted("kernels_full", 7100)

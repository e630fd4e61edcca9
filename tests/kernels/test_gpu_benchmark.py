"""What the benchmark says on a machine that it cannot measure."""

import pytest
import torch

from benchmarks.gpu import main


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the benchmark needs")
def test_without_a_device_it_says_so(capsys):
    assert main(["--only", "kernels"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "no CUDA device" in printed.err

"""The cases that every attention kernel is tested on: pairs of them always, their product when asked for."""

from itertools import product
from typing import Any

import pytest
import torch

from tests.helpers.pairwise import pairwise

HEAD_DIMS = (64, 80, 96, 128, 256)
GROUPS = tuple(range(1, 17))
BLOCKS = (16, 32, 64)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WINDOWS = (0, 21)


def cases(*columns: tuple[Any, ...]) -> list[Any]:
    """Parameters for pytest; those that no pair needs are marked `kernels_full`."""
    chosen = set(pairwise(*columns))
    return [
        pytest.param(
            *case,
            marks=() if case in chosen else pytest.mark.kernels_full,
            id="-".join(str(value).removeprefix("torch.") for value in case),
        )
        for case in product(*columns)
    ]

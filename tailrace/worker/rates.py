"""Measured rates, exponentially weighted; 0 before the first measurement."""

WEIGHT = 0.2


class Ewma:
    def __init__(self) -> None:
        self.value = 0.0

    def add(self, sample: float) -> None:
        self.value = sample if self.value == 0.0 else (1 - WEIGHT) * self.value + WEIGHT * sample


FIT_FORGET = 0.05
FIT_SPREAD = 0.05
"""What a worker's fits of its own steps are made with, see LineFit: it measures wall-clock time beside other work."""

"""Measured rates, exponentially weighted; 0 before the first measurement."""

WEIGHT = 0.2


class Ewma:
    def __init__(self) -> None:
        self.value = 0.0

    def add(self, sample: float) -> None:
        self.value = sample if self.value == 0.0 else (1 - WEIGHT) * self.value + WEIGHT * sample

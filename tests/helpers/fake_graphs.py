"""CUDA graphs without CUDA: what was recorded is computed again, into the memory of the recording."""

from collections.abc import Callable
from dataclasses import fields

from tailrace.engine.cuda_graphs import DecodeStep, Graph


class FakeRecorder:
    """`recorded` and `replayed`: numbers of rows, in order."""

    def __init__(self) -> None:
        self.recorded: list[int] = []
        self.replayed: list[int] = []

    def record(self, compute: Callable[[], DecodeStep]) -> Graph:
        step = compute()
        self.recorded.append(len(step.slots))

        def replay() -> None:
            again = compute()
            for field in fields(step):
                getattr(step, field.name).copy_(getattr(again, field.name))
            self.replayed.append(len(step.slots))

        return Graph(replay, step)

    def used_bytes(self) -> int:
        return len(self.recorded) << 20

"""Which steps replay a graph and with which rows; that they compute the same is tested with the kernels."""

import logging

import pytest
import torch
from torch import Tensor

from tailrace.engine import cuda_graphs
from tailrace.engine.batch import BatchState
from tailrace.engine.cuda_graphs import DecodeGraphs, DecodeStep, capture, graph_size, graph_sizes, padded_slots
from tailrace.plan import Chunk, StepPlan
from tests.helpers.fake_graphs import FakeRecorder

POOL = torch.zeros(1)


@pytest.fixture(autouse=True)
def _model_that_tells_its_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(model: object, batch: BatchState, slots: Tensor, pool: Tensor) -> DecodeStep:
        wide = slots.float().unsqueeze(1)
        return DecodeStep(wide, -wide, slots.clone(), batch.choices[slots], batch.lengths[slots])

    monkeypatch.setattr(cuda_graphs, "padded_step", step)


def batch_of(num_slots: int) -> BatchState:
    return BatchState(num_slots + 1, 32, 16, torch.device("cpu"))


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (1, [1]),
        (2, [1, 2]),
        (3, [1, 2, 3]),
        (64, [1, 2, 4, 8, 16, 32, 64]),
        (100, [1, 2, 4, 8, 16, 32, 64, 100]),
        (4096, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]),
    ],
)
def test_sizes(most: int, sizes: list[int]) -> None:
    assert graph_sizes(most) == sizes


@pytest.mark.parametrize(
    ("plan", "size"),
    [
        (StepPlan(decode=[3]), 1),
        (StepPlan(decode=[0, 1, 2]), 4),
        (StepPlan(decode=[0, 1, 2, 3]), 4),
        (StepPlan(decode=list(range(5))), None),
        (StepPlan(decode=[0], chunks=[Chunk(1, 0, 4)]), None),
        (StepPlan(chunks=[Chunk(1, 0, 4, (0,))]), None),
        (StepPlan(), None),
    ],
)
def test_only_steps_of_decode_rows_that_fit_are_replayed(plan: StepPlan, size: int | None) -> None:
    assert graph_size(plan, [1, 2, 4]) == size


def test_missing_rows_are_of_the_empty_slot() -> None:
    assert padded_slots([4, 2], 4, 9) == [4, 2, 9, 9]
    assert padded_slots([4], 1, 9) == [4]


def test_the_largest_graph_is_captured_first() -> None:
    recorder = FakeRecorder()
    DecodeGraphs(None, batch_of(6), POOL, [1, 2, 4, 6], recorder)  # type: ignore[arg-type]
    assert recorder.recorded == [6, 4, 2, 1]


def test_a_step_has_its_own_rows_only() -> None:
    recorder, batch = FakeRecorder(), batch_of(8)
    graphs = DecodeGraphs(None, batch, POOL, [2, 4, 8], recorder)  # type: ignore[arg-type]
    batch.choices[5], batch.lengths[5] = 3, 17
    step = graphs.replay(StepPlan(decode=[7, 5, 0]))
    assert step is not None
    assert recorder.replayed == [4]
    assert [step.slots.tolist(), step.choices.tolist(), step.positions.tolist()] == [[7, 5, 0], [0, 3, 0], [0, 17, 0]]
    assert step.logits.tolist() == [[-7.0], [-5.0], [0.0]]
    assert step.draws.rows is None
    assert graphs.replay(StepPlan(decode=[1], chunks=[Chunk(0, 0, 4)])) is None
    assert recorder.replayed == [4]


def test_rows_of_an_earlier_and_larger_step_are_gone() -> None:
    graphs = DecodeGraphs(None, batch_of(8), POOL, [1, 2, 4, 8], FakeRecorder())  # type: ignore[arg-type]
    for decode in ([0, 1, 2, 3, 4], [4, 3, 2], [6], [0, 1, 2, 3, 4], [1, 2, 5]):
        step = graphs.replay(StepPlan(decode=decode))
        assert step is not None
        assert step.slots.tolist() == decode
        filled = graphs._slots[: graph_size(StepPlan(decode=decode), [1, 2, 4, 8])]
        assert filled.tolist() == padded_slots(decode, len(filled), 8)


def test_rows_are_staged_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = DecodeGraphs(None, batch_of(4), POOL, [1, 2, 4], FakeRecorder())  # type: ignore[arg-type]
    staged = []
    plain = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda values, **rest: staged.append(values) or plain(values, **rest))
    for decode in ([0, 1, 2], [0, 1, 2], (0, 1, 2), [0, 1], [0, 2], [0, 1, 2]):
        graphs.replay(StepPlan(decode=decode))
    assert staged == [[0, 1, 2, 4], [0, 2], [0, 1, 2, 4]]


def test_a_capture_says_what_it_took(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert capture(None, batch_of(3), POOL, 3, FakeRecorder()) is not None  # type: ignore[arg-type]
    assert "captured 3 CUDA graphs of decode steps, for batches up to 3" in caplog.text
    assert "3 MiB" in caplog.text


def test_a_capture_that_fails_is_loud_and_leaves_the_engine_without_graphs(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(FakeRecorder):
        def record(self, compute: object) -> object:  # type: ignore[override]
            raise RuntimeError("operation not permitted when stream is capturing")

    assert capture(None, batch_of(3), POOL, 3, Failing()) is None  # type: ignore[arg-type]
    assert "CUDA GRAPHS ARE OFF" in caplog.text
    assert "operation not permitted" in caplog.text

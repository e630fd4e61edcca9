"""A step asks its device for one thing: what was drawn. The device here is torch's `meta`, whose tensors have no
memory: whatever else looks at one of them (item, tolist, nonzero, a copy, a condition) raises."""

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tailrace.engine import runner as runner_module
from tailrace.engine import sampler
from tailrace.engine.batch import BatchState
from tailrace.engine.host_copies import HostCopy, upload
from tailrace.engine.kernels import backend
from tailrace.engine.kernels.sampling import kernel
from tailrace.engine.kernels.sampling.columns import SlotTensors
from tailrace.engine.runner import ModelRunner
from tailrace.engine.sampler import SamplingState
from tailrace.plan import BlockAppend, BlockCopy, Chunk, SequenceStart, StepPlan
from tailrace.types import SamplingParams

DEVICE = torch.device("meta")
VOCAB, HIDDEN, SLOTS, MAX_LEN, BLOCK = 50, 8, 4, 64, 16
GREEDY = SamplingParams(temperature=0.0)
EVERYTHING = SamplingParams(
    temperature=0.7,
    top_k=5,
    top_p=0.9,
    min_p=0.1,
    repetition_penalty=1.2,
    presence_penalty=0.5,
    min_tokens=3,
    logit_bias=((3, 1.0),),
    stop_token_ids=(7,),
    logprobs=3,
    seed=1 << 40,
)


class MetaCopy(HostCopy):
    """Zeros for what the device would say."""

    made: ClassVar["list[MetaCopy]"] = []

    def __init__(self, words: Tensor) -> None:
        assert words.is_meta
        assert words.dtype == torch.int32
        self.num_words = len(words)
        MetaCopy.made.append(self)

    def wait(self) -> Tensor:
        return torch.zeros(self.num_words, dtype=torch.int32)


class Copies(TorchDispatchMode):
    """What goes from the host to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sources = [value for value in args[-2:] if isinstance(value, Tensor) and value.is_cpu and value.dim()]
        is_copy = func._schema.name in ("aten::copy_", "aten::_to_copy")
        if is_copy and sources and getattr(out, "is_meta", False) and not (kwargs or {}).get("non_blocking"):
            self.waiting.append(str(func))
        return out


class MetaModel:
    """Looks at all that a model is given, as the real one does."""

    config: Any = None
    windows = (0, 9)

    def forward(self, plan: StepPlan, batch: BatchState, pool: Tensor) -> Tensor:
        inputs = batch.inputs(plan, pool, self.windows)
        assert len(inputs.token_ids) == len(inputs.write_rows) == plan.num_tokens
        return torch.zeros(plan.num_tokens, HIDDEN, device=DEVICE)

    def logits(self, hidden: Tensor, *, reuse: bool = False) -> Tensor:
        return torch.zeros(len(hidden), VOCAB, device=DEVICE)


class MetaCache:
    def __init__(self) -> None:
        self.tensor = torch.zeros(12, 2, 2, 2, BLOCK, 16, device=DEVICE)

    def copy_block(self, source: int, target: int) -> None:
        self.tensor[target] = self.tensor[source]


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that only have the shapes of the real ones."""

    def adjust(logits: Tensor, state: SlotTensors, slots: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
        return torch.empty_like(logits)

    def draw(logits: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        rows = len(logits)
        return torch.zeros(rows, dtype=torch.int64, device=DEVICE), torch.zeros(rows, dtype=torch.bool, device=DEVICE)

    monkeypatch.setattr(backend, "runs_triton", lambda tensor: True)
    monkeypatch.setattr(kernel, "adjust", adjust)
    monkeypatch.setattr(kernel, "draw", draw)
    for module in (sampler, runner_module):
        monkeypatch.setattr(module, "HostCopy", MetaCopy)
    monkeypatch.setattr(MetaCopy, "made", [])


@pytest.fixture
def runner() -> ModelRunner:
    batch = BatchState(SLOTS, MAX_LEN, BLOCK, DEVICE)
    return ModelRunner(MetaModel(), MetaCache(), batch, SamplingState(SLOTS, VOCAB, (3,), DEVICE))  # type: ignore[arg-type]


def start(
    slot: int, num_tokens: int, sampling: SamplingParams, blocks: Sequence[int], choice: int = 0
) -> SequenceStart:
    return SequenceStart(slot, list(range(num_tokens)), num_tokens, sampling, choice, list(blocks))


PLANS = [
    StepPlan(
        started=[start(0, 20, GREEDY, [0, 1]), start(1, 16, EVERYTHING, [2])],
        chunks=[Chunk(0, 0, 20, (0,)), Chunk(1, 0, 10)],
    ),
    StepPlan(chunks=[Chunk(1, 10, 16, (0, 1, 2))], decode=[0]),
    StepPlan(decode=[0, 1], appended=[BlockAppend(1, 1, [3])]),
    StepPlan(decode=[1, 0]),
    StepPlan(started=[start(2, 17, EVERYTHING, [4, 5], choice=1)], copies=[BlockCopy(3, 5)], decode=[0, 1, 2]),
    StepPlan(released=[1], started=[start(3, 30, GREEDY, [6, 7])], chunks=[Chunk(3, 0, 12)]),
    StepPlan(released=[0]),
]


def test_a_step_makes_one_copy_to_the_host_and_waits_for_nothing(runner: ModelRunner) -> None:
    copies = Copies()
    launched = []
    with copies:
        for number, plan in enumerate(PLANS, start=1):
            launched.append(runner.launch(plan))
            assert len(MetaCopy.made) == number, "one a step"
    assert copies.waiting == []
    outputs = [step.wait() for step in launched]
    assert len(MetaCopy.made) == len(PLANS), "waiting copies nothing more"
    assert [out.slots for out in outputs] == [[0], [0, 1, 1, 1], [0, 1], [1, 0], [0, 1, 2], [], []]
    assert [out.choices for out in outputs] == [[0], [0, 0, 1, 2], [0, 0], [0, 0], [0, 0, 1], [], []]
    assert [out.positions for out in outputs] == [[20], [21, 16, 16, 16], [22, 17], [18, 23], [24, 19, 17], [], []]
    assert [len(out.tokens) for out in outputs] == [1, 4, 2, 2, 3, 0, 0]
    assert [entry is not None for entry in outputs[4].logprobs or ()] == [False, True, True]


def test_the_device_here_says_nothing_to_anybody() -> None:
    """Else the test above would show nothing."""
    some = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    for look in (some.tolist, some.nonzero, some.cpu, some.numpy, lambda: int(some[0]), lambda: bool(some.any())):
        with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
            look()
    copies = Copies()
    with copies:
        some[:2] = torch.tensor([1, 2])
        torch.tensor([1, 2]).to(DEVICE)
        upload([1, 2], torch.int64, DEVICE)
    assert len(copies.waiting) == 2


def test_on_a_cpu_nothing_is_copied() -> None:
    words = torch.arange(3, dtype=torch.int32)
    assert HostCopy(words).wait() is words

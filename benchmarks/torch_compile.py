"""One decoder layer's decode step: the compiled C kernels, torch operation by operation, and torch.compile, by turns.

    python -m benchmarks.torch_compile [--batch 16 32] [--context 256]

Random weights of SmolLM2-135M's shapes in bfloat16, one thread; all arms compute the same step over the same cached
tokens, after their hidden states were compared. "frozen" lets torch.compile pack the weights for oneDNN, as the eager
arm has them. The one decision that depends on a tensor is left out, so that the layer is one graph. The C kernels'
times include the reading of the plan, the others' do not.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
import torch._inductor.config as inductor
from torch import Tensor, nn

from tailrace.checkpoint.cache_dir import default_cache_dir
from tailrace.checkpoint.model_config import ModelConfig, load_model_config
from tailrace.cli.model import fetch_model
from tailrace.config import DEFAULT_MODEL
from tailrace.engine.batch import BatchState
from tailrace.engine.kernels.rope_kv_write import naive as rope_spec
from tailrace.engine.models.decoder import Decoder
from tailrace.engine.models.linear import LinearMaker, linear_maker
from tailrace.engine.models.loading import LinearMakers, load_weights, tensor_shapes
from tailrace.engine.models.rotary import RotaryTable, rotary_table
from tailrace.engine.native.decoder import NativeDecoder
from tailrace.engine.native.library import load_library
from tailrace.engine.native.packing import WeightArena
from tailrace.engine.weights import DummySource
from tailrace.plan import SequenceStart, StepPlan
from tailrace.types import SamplingParams

BLOCK = 16
CALLS = 20
CPU = torch.device("cpu")

Step = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Scene:
    """What every arm computes with."""

    config: ModelConfig
    rotary: RotaryTable
    batch: BatchState
    plan: StepPlan
    pool: Tensor


class FrozenLinear(nn.Module):
    """Its weight is a parameter, which is what freezing looks for."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Layer(nn.Module):
    """A decoder of one layer as torch.compile wants it: its linear layers are modules of this one."""

    def __init__(self, scene: Scene) -> None:
        super().__init__()
        self.linears = nn.ModuleList()
        self._decoder = torch_decoder(scene, self._make)
        self._inputs = scene.batch.inputs(scene.plan, scene.pool, self._decoder.windows)

    def _make(self, weight: Tensor, bias: Tensor | None) -> FrozenLinear:
        self.linears.append(FrozenLinear(weight, bias))
        made = self.linears[-1]
        assert isinstance(made, FrozenLinear)
        return made

    def forward(self, pool: Tensor) -> Tensor:
        return self._decoder.compute(self._inputs, pool)


def scene_of(batch_size: int, context: int) -> Scene:
    config = replace(load_model_config(fetch_model(DEFAULT_MODEL)), num_layers=1)
    blocks = -(-(context + 1) // BLOCK)
    batch = BatchState(batch_size, context + BLOCK, BLOCK, CPU)
    for slot in range(batch_size):
        tokens = torch.randint(config.vocab_size, (context,)).tolist()
        own = range(slot * blocks, (slot + 1) * blocks)
        batch.update([SequenceStart(slot, tokens, len(tokens), SamplingParams(), 0, list(own))], [])
    size = (batch_size * blocks, 1, 2, config.num_kv_heads, BLOCK, config.head_dim)
    rotary = rotary_table(config.rope, config.head_dim, context + BLOCK, CPU)
    return Scene(config, rotary, batch, StepPlan(decode=list(range(batch_size))), torch.randn(size).bfloat16())


def torch_decoder(scene: Scene, make: LinearMaker) -> Decoder:
    source = DummySource(tensor_shapes(scene.config))
    weights = load_weights(source, scene.config, LinearMakers(make, make), dtype=torch.bfloat16, device=CPU)
    return Decoder(scene.config, weights, scene.rotary)


def native_step(scene: Scene) -> Step:
    arena = WeightArena()
    makers = LinearMakers(arena.pack, arena.pack_gated)
    source = DummySource(tensor_shapes(scene.config))
    weights = load_weights(source, scene.config, makers, dtype=torch.bfloat16, device=CPU)
    library = load_library("bfloat16", default_cache_dir())
    decoder = NativeDecoder(scene.config, weights, scene.rotary, library, 1)
    return lambda: decoder.forward(scene.plan, scene.batch, scene.pool)


def eager_step(scene: Scene) -> Step:
    decoder = torch_decoder(scene, linear_maker(torch.bfloat16, CPU))
    inputs = scene.batch.inputs(scene.plan, scene.pool, decoder.windows)
    return lambda: decoder.compute(inputs, scene.pool)


def write_all(pool: Tensor, layer: int, rows: Tensor, keys_values: Tensor) -> None:
    """kernels.kv_write for rows that are all somebody's."""
    first = layer * 2 * pool.shape[3] * pool.shape[4]
    pool.view(-1, pool.shape[-1])[first:].index_put_((rows,), keys_values)


def compiled_step(scene: Scene, *, freezing: bool) -> Step:
    layer = torch.compile(
        Layer(scene), dynamic=False, fullgraph=True, options={"freezing": freezing, "fx_graph_cache": False}
    )
    with inductor.patch(freezing=freezing):  # tracing asks it too
        layer(scene.pool)
    return lambda: layer(scene.pool)


def time_arms(arms: Sequence[tuple[str, Step]], rounds: int) -> dict[str, list[float]]:
    """Seconds a step; in each round every arm has one turn of CALLS steps, the first ones in rotating order."""
    seconds: dict[str, list[float]] = {name: [] for name, _ in arms}
    for turn in range(rounds):
        for index in range(len(arms)):
            name, step = arms[(turn + index) % len(arms)]
            step()
            began = time.perf_counter()
            for _ in range(CALLS):
                step()
            seconds[name].append((time.perf_counter() - began) / CALLS)
    return seconds


def measure(batch_size: int, context: int, rounds: int) -> None:
    torch.compiler.reset()
    scene = scene_of(batch_size, context)
    makers: list[tuple[str, Callable[[], Step]]] = [
        ("C kernels", lambda: native_step(scene)),
        ("eager", lambda: eager_step(scene)),
        ("torch.compile", lambda: compiled_step(scene, freezing=False)),
        ("torch.compile, frozen", lambda: compiled_step(scene, freezing=True)),
    ]
    arms, ready, expected = [], {}, None
    for name, make in makers:
        began = time.perf_counter()
        step = make()
        hidden = step()
        ready[name] = time.perf_counter() - began
        expected = hidden if expected is None else expected
        torch.testing.assert_close(hidden, expected, rtol=0.05, atol=0.05)
        arms.append((name, step))
    seconds = time_arms(arms, rounds)
    for name, own in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(own, seconds["C kernels"], strict=True))
        print(f"| {batch_size} | {name} | {statistics.median(own) * 1e6:.0f} | {ratio:.2f} | {ready[name]:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--context", type=int, default=256, help="Tokens of each sequence, the new one included.")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| batch | arm | us a step, median | over the C kernels | s until ready |")
    print("|---|---|---|---|---|")
    with torch.inference_mode(), patch.object(rope_spec, "kv_write", write_all):
        for batch_size in options.batch:
            measure(batch_size, options.context, options.rounds)


if __name__ == "__main__":
    main()

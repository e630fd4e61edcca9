"""Small random checkpoints in Hugging Face's format, and engines on them."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from tailrace.engine.engine import Engine, EngineOptions, load_engine
from tailrace.plan import Chunk, SequenceStart, StepPlan
from tailrace.types import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
_SIZES: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save_model(directory: Path, family: str, **overrides: Any) -> torch.nn.Module:
    """Writes a random model of `family` ("Llama", "Qwen3", ...) and returns the reference: float32, in eval mode."""
    torch.manual_seed(7)
    config = getattr(transformers, f"{family}Config")(**{**_SIZES, **overrides})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        _randomize(name, parameter)
    model.eval()
    model.save_pretrained(directory)
    return model


def _randomize(name: str, parameter: Tensor) -> None:
    """Far enough from the usual start that a forgotten norm weight, bias or scale shows in the logits.

    Rounded to bfloat16, so that an engine of either dtype has the reference's very weights.
    """
    with torch.no_grad():
        if name.endswith("norm.weight"):
            parameter.normal_(1.0, 0.2)
        else:
            parameter.normal_(0.0, 0.3 if name.endswith("bias") else parameter.shape[-1] ** -0.5)
        parameter.copy_(parameter.bfloat16())


def engine_on(directory: Path, *, dtype: str = "float32", **options: Any) -> Engine:
    chosen: dict[str, Any] = {"kv_cache_bytes": 1 << 26, "max_num_seqs": 8, "device": "cpu", **options}
    return load_engine(EngineOptions(model_dir=directory, dtype=dtype, **chosen))


def start(
    slot: int, tokens: Sequence[int], blocks: Sequence[int], *, sampling: SamplingParams = GREEDY, choice: int = 0
) -> SequenceStart:
    return SequenceStart(slot, list(tokens), len(tokens), sampling, choice, list(blocks))


def chunks_of(slot: int, begin: int, end: int, size: int) -> list[Chunk]:
    """[begin, end) in chunks of `size`; only the last one draws, for choice 0."""
    bounds = [*range(begin, end, size), end]
    return [Chunk(slot, low, high, (0,) if high == end else ()) for low, high in pairwise(bounds)]


@torch.inference_mode()
def prompt_logits(
    engine: Engine, tokens: Sequence[int], blocks: Sequence[int], *, chunk: int, begin: int = 0
) -> Tensor:
    """[len(tokens) - begin, vocab]: the logits at every position from `begin` on, computed in slot 0 by chunks.

    The KV of the tokens before `begin` is taken from `blocks` as it is.
    """
    runner = engine.runner
    started: tuple[SequenceStart, ...] = (start(0, tokens, blocks),)
    hidden: list[Tensor] = []
    for part in chunks_of(0, begin, len(tokens), chunk):
        step = runner.forward(StepPlan(started=started, chunks=[part]))
        assert step is not None
        hidden.append(step.hidden)
        started = ()
    return runner.model.logits(torch.cat(hidden))


@torch.inference_mode()
def reference_logits(model: torch.nn.Module, tokens: Sequence[int]) -> Tensor:
    """[len(tokens), vocab] float32"""
    return model(torch.tensor([list(tokens)])).logits[0].float()

"""Chooses what a model runs on: kernels compiled for this processor, or torch's own operations."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from tailrace.checkpoint.model_config import ModelConfig
from tailrace.compiler import NativeUnavailableError
from tailrace.engine.models.loading import LinearMakers, load_decoder, load_weights
from tailrace.engine.models.rotary import rotary_table
from tailrace.engine.native.decoder import NativeDecoder, why_not_native
from tailrace.engine.native.library import NativeLibrary, load_library
from tailrace.engine.native.packing import WeightArena
from tailrace.engine.runner import Model
from tailrace.engine.weights import Progress, TensorSource

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """What to load, and what for."""

    config: ModelConfig
    dtype: str
    device: torch.device
    max_model_len: int
    num_threads: int
    quantization: str = "none"


def load_model(source: TensorSource, target: Target, *, native_in: Path | None, progress: Progress | None) -> Model:
    """native_in: where compiled kernels are kept; None: do without. Warns, once and loudly, where they cannot be had.

    Raises CheckpointError naming the file.
    """
    if native_in is not None and target.device.type == "cpu":
        try:
            library = _library(target, native_in)
            return _load_native(source, target, library, progress)
        except NativeUnavailableError as error:
            _log.warning("THE FAST CPU KERNELS ARE OFF and generation is several times slower: %s", error)
    return load_decoder(
        source,
        target.config,
        dtype=getattr(torch, target.dtype),
        device=target.device,
        max_model_len=target.max_model_len,
        quantization=target.quantization,
        progress=progress,
    )


def _library(target: Target, cache_dir: Path) -> NativeLibrary:
    obstacle = why_not_native(target.config, target.dtype, target.num_threads)
    if obstacle is not None:
        raise NativeUnavailableError(obstacle)
    return load_library(target.dtype, cache_dir)


def _load_native(
    source: TensorSource, target: Target, library: NativeLibrary, progress: Progress | None
) -> NativeDecoder:
    config, arena = target.config, WeightArena(target.quantization)
    makers = LinearMakers(arena.pack, arena.pack_gated)
    dtype: torch.dtype = getattr(torch, target.dtype)
    weights = load_weights(source, config, makers, dtype=dtype, device=target.device, progress=progress)
    rotary = rotary_table(config.rope, config.head_dim, target.max_model_len, target.device)
    return NativeDecoder(config, weights, rotary, library, target.num_threads)

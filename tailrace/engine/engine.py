"""load_engine: from a model directory and options to something that runs plans."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from tailrace.checkpoint.cache_dir import default_cache_dir
from tailrace.checkpoint.model_config import DTYPES, ModelConfig, load_model_config
from tailrace.engine.batch import BatchState
from tailrace.engine.cuda_graphs import CudaRecorder, GraphModel, capture
from tailrace.engine.implementation import Target, load_model
from tailrace.engine.kv_cache import KVCache
from tailrace.engine.models.loading import open_source
from tailrace.engine.models.quantization import QUANTIZATIONS
from tailrace.engine.runner import Model, ModelRunner
from tailrace.engine.sampler import SamplingState
from tailrace.engine.weights import Progress
from tailrace.errors import ConfigError
from tailrace.kv.layout import KVLayout, LayerGroup
from tailrace.kv.window import Window

NUMERICS_VERSION = 2
"""Part of every layout: raise it whenever the engine computes keys or values differently."""
LOAD_FORMATS = ("auto", "dummy")
_DEVICES = ("auto", "cpu", "cuda")
_MIN_BLOCKS = 2


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What a worker chooses. The rest follows from the model."""

    model_dir: Path
    dtype: str = "auto"
    """auto: the checkpoint's, or bfloat16 where it names none."""
    block_size: int = 16
    """Tokens a block."""
    num_blocks: int | None = None
    """None: as many as kv_cache_bytes hold."""
    kv_cache_bytes: int = 1 << 30
    max_num_seqs: int = 64
    max_model_len: int | None = None
    """None: the model's."""
    load_format: str = "auto"
    """auto: safetensors; dummy: random weights of the right shapes."""
    num_threads: int = 1
    device: str = "auto"
    """auto: the CPU. cuda runs Triton kernels; tests interpret and compile them, but none has run on a GPU yet,
    so it must be asked for."""
    quantization: str = "none"
    """int8: the matrices of the layers and the head are rounded to 8 bits as they load. On a CPU only."""
    native: bool = True
    """On a CPU, use kernels compiled for it where they can be had."""
    enforce_eager: bool = False
    """On a CUDA device, launch every operation of a decode step by itself instead of replaying CUDA graphs."""
    cache_dir: Path | None = None
    """Where compiled kernels are kept; None: tailrace in the user's cache directory."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A loaded model with its memory. One thread runs it."""

    config: ModelConfig
    layout: KVLayout
    cache: KVCache
    runner: ModelRunner
    max_model_len: int


def load_engine(options: EngineOptions, *, progress: Progress | None = None) -> Engine:
    """`progress(label, bytes done, bytes in all)` is called as weights load. Sets torch's number of threads.

    Raises ConfigError naming the option, or CheckpointError naming the file.
    """
    _check(options)
    torch.set_num_threads(options.num_threads)
    config = load_model_config(options.model_dir)
    max_model_len = _max_model_len(options, config)
    dtype, device = _dtype(options, config), _device(options)
    source = open_source(options.model_dir, config, options.load_format)
    layout = _layout(config, source.digest, options, dtype)
    num_blocks = _num_blocks(options, layout, max_model_len)
    target = Target(config, dtype, device, max_model_len, options.num_threads, options.quantization)
    with torch.inference_mode():
        model = load_model(source, target, native_in=_native_cache(options), progress=progress)
    cache = KVCache(layout, num_blocks, device)
    sampling = SamplingState(options.max_num_seqs, config.vocab_size, config.eos_token_ids, device)
    return Engine(config, layout, cache, _runner(options, model, cache, sampling, max_model_len), max_model_len)


def _runner(
    options: EngineOptions, model: Model, cache: KVCache, sampling: SamplingState, max_model_len: int
) -> ModelRunner:
    device = cache.tensor.device
    if device.type != "cuda" or options.enforce_eager:
        batch = BatchState(options.max_num_seqs, max_model_len, options.block_size, device)
        return ModelRunner(model, cache, batch, sampling)
    # Rows that only fill a graph up are of a slot behind the others, which stays empty.
    batch = BatchState(options.max_num_seqs + 1, max_model_len, options.block_size, device)
    decoder = cast(GraphModel, model)  # the other kind of model is for CPUs
    with torch.inference_mode():
        graphs = capture(decoder, batch, cache.tensor, options.max_num_seqs, CudaRecorder(device))
    return ModelRunner(model, cache, batch, sampling, graphs)


def _check(options: EngineOptions) -> None:
    for name, least in (("block_size", 1), ("max_num_seqs", 1), ("num_threads", 1), ("kv_cache_bytes", 1)):
        if getattr(options, name) < least:
            raise ConfigError(f"{name} must be at least {least}, not {getattr(options, name)}", param=name)
    for name, choices in (
        ("dtype", ("auto", *DTYPES)),
        ("load_format", LOAD_FORMATS),
        ("device", _DEVICES),
        ("quantization", QUANTIZATIONS),
    ):
        if getattr(options, name) not in choices:
            given = getattr(options, name)
            raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {given!r}", param=name)


def _max_model_len(options: EngineOptions, config: ModelConfig) -> int:
    limit = config.max_position_embeddings
    chosen = limit if options.max_model_len is None else options.max_model_len
    if not 1 <= chosen <= limit:
        raise ConfigError(
            f"max_model_len must be 1 to {limit}, the model's max_position_embeddings, not {chosen}",
            param="max_model_len",
        )
    return chosen


def _dtype(options: EngineOptions, config: ModelConfig) -> str:
    return (config.dtype or "bfloat16") if options.dtype == "auto" else options.dtype


def _device(options: EngineOptions) -> torch.device:
    if options.device == "cuda" and options.quantization != "none":
        raise ConfigError(
            f"quantization {options.quantization} is for CPUs; on device cuda it must be none", param="quantization"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no CUDA device", param="device")
    return torch.device("cpu" if options.device == "auto" else options.device)


def _native_cache(options: EngineOptions) -> Path | None:
    return (options.cache_dir or default_cache_dir()) if options.native else None


def _layout(config: ModelConfig, weights_digest: str, options: EngineOptions, dtype: str) -> KVLayout:
    full = tuple(layer for layer in range(config.num_layers) if layer not in config.windowed_layers)
    groups: tuple[LayerGroup, ...] = (LayerGroup("full", full),) if full else ()
    if config.windowed_layers:
        groups += (LayerGroup("sliding_window", config.windowed_layers, config.window),)
    return KVLayout(
        model_digest=config.digest,
        weights_digest=weights_digest,
        quantization=options.quantization,
        numerics_version=NUMERICS_VERSION,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_size=options.block_size,
        kv_dtype=dtype,
        groups=groups,
    )


def _num_blocks(options: EngineOptions, layout: KVLayout, max_model_len: int) -> int:
    """Must hold one sequence of the longest kind, else a request that was accepted could never be finished."""
    needed = max(_MIN_BLOCKS, Window(layout.window, layout.block_size).least_held(max_model_len))
    if options.num_blocks is not None:
        if options.num_blocks < needed:
            raise ConfigError(
                f"num_blocks = {options.num_blocks} is too few: max_model_len {max_model_len} takes {needed}",
                param="num_blocks",
            )
        return options.num_blocks
    num_blocks = options.kv_cache_bytes // layout.block_bytes
    if num_blocks < needed:
        raise ConfigError(
            f"kv_cache_bytes = {options.kv_cache_bytes} is too little: max_model_len {max_model_len} takes "
            f"{needed * layout.block_bytes}; raise it or lower max_model_len",
            param="kv_cache_bytes",
        )
    return num_blocks

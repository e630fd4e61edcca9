"""The decoder of models/decoder.py with a whole step in one call of the compiled kernels."""

import ctypes
import weakref
from ctypes import c_int64

import torch
from torch import Tensor

from tailrace.checkpoint.model_config import ModelConfig
from tailrace.compiler import NativeUnavailableError
from tailrace.engine.batch import BatchState
from tailrace.engine.models.decoder import DecoderWeights, LayerWeights
from tailrace.engine.models.quantization import HEAD_SHARE
from tailrace.engine.models.rotary import RotaryTable
from tailrace.engine.native.library import (
    PHASES,
    ChunkStruct,
    ClockStruct,
    LayerStruct,
    LinearStruct,
    LogitsStruct,
    ModelStruct,
    NativeLibrary,
    RefinementStruct,
    StepStruct,
)
from tailrace.engine.native.packing import PackedWeight
from tailrace.engine.native.workspace import Workspace
from tailrace.plan import StepPlan

_MAX_HEAD_DIM = 256
_MAX_GROUP = 128
_MAX_THREADS = 256


def why_not_native(config: ModelConfig, dtype: str, num_threads: int) -> str | None:
    """What about this model the kernels cannot do; None: nothing."""
    if dtype not in ("bfloat16", "float32"):
        return f"they compute bfloat16 and float32, not {dtype}"
    if config.head_dim % 8 or config.head_dim > _MAX_HEAD_DIM:
        return f"they need a head_dim that is a multiple of 8 up to {_MAX_HEAD_DIM}, not {config.head_dim}"
    if config.num_heads // config.num_kv_heads > _MAX_GROUP:
        return f"they serve up to {_MAX_GROUP} heads a key head"
    if config.hidden_size % 2 or config.intermediate_size % 2:
        return "they need even hidden_size and intermediate_size"
    if num_threads > _MAX_THREADS:
        return f"they run up to {_MAX_THREADS} threads, not {num_threads}"
    return None


class NativeDecoder:
    """Equal to Decoder but for the order of sums, and rounds less. Keeps its memory from step to step: one thread."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights[PackedWeight],
        rotary: RotaryTable,
        library: NativeLibrary,
        num_threads: int,
    ) -> None:
        self.config = config
        self._library = library
        threads = library.open_threads(num_threads)
        if not threads:
            raise NativeUnavailableError(f"{num_threads} threads cannot be started")
        weakref.finalize(self, library.close_threads, threads)
        # The structs hold addresses only: this keeps what they point to.
        self._kept = (weights, rotary)
        self._head_rows = None if weights.lm_head.scales is None else weights.lm_head_rows.contiguous()
        self._layers = (LayerStruct * config.num_layers)(
            *(_layer(layer, _window(config, index)) for index, layer in enumerate(weights.layers))
        )
        self._model = _model(config, weights, rotary, self._layers, threads)
        self._clock = ClockStruct()
        self._step = StepStruct(jobs=(c_int64 * config.num_layers)())
        self._workspace = Workspace(config, weights.embedding.dtype, rounded_bytes=_rounded_bytes(config, library))
        self._dtype = weights.embedding.dtype

    def forward(self, plan: StepPlan, batch: BatchState, pool: Tensor) -> Tensor:
        """As Decoder.forward. Raises ValueError for a slot, token or block that does not exist."""
        self._model.num_blocks, self._model.block = pool.shape[0], pool.shape[4]
        hidden = torch.empty(plan.num_tokens, self.config.hidden_size)
        self._set_plan(plan)
        self._set_batch(batch)
        step = self._step
        step.pool, step.hidden = pool.data_ptr(), hidden.data_ptr()
        num_parts = self._library.num_parts(ctypes.addressof(self._model), ctypes.addressof(step))
        self._workspace.fit(plan.num_tokens, len(plan.decode) * num_parts if num_parts > 1 else 0)
        self._workspace.fill(step)
        if not self._library.forward(ctypes.addressof(self._model), ctypes.addressof(step)):
            raise ValueError("the plan names a slot, token or block that does not exist")
        return hidden

    def logits(self, hidden: Tensor, *, reuse: bool = False) -> Tensor:
        """As Decoder.logits. `reuse`: the result is overwritten by the next call that says so."""
        hidden = hidden.contiguous()
        rows, vocab = hidden.shape[0], self.config.vocab_size
        normed = torch.empty(rows, self.config.hidden_size, dtype=self._dtype)
        logits = self._workspace.logits(rows) if reuse else torch.empty(rows, vocab)
        call = LogitsStruct(
            ctypes.pointer(self._model),
            hidden.data_ptr(),
            rows,
            normed.data_ptr(),
            self._workspace.rounded(rows),
            logits.data_ptr(),
            self._step.clock,
        )
        self._library.logits(ctypes.addressof(call))
        if self._head_rows is not None:
            self._refine(logits, normed, self._head_rows)
        return logits

    def _refine(self, logits: Tensor, normed: Tensor, head_rows: Tensor) -> None:
        """As refine_best of models/decoder.py. logits: [rows, vocab], changed in place; normed: [rows, hidden]."""
        rows, vocab = logits.shape
        addresses = logits.data_ptr(), rows, vocab, normed.shape[1], normed.data_ptr(), head_rows.data_ptr()
        call = RefinementStruct(self._model.threads, *addresses, HEAD_SHARE)
        self._library.refine(ctypes.addressof(call))

    def time_phases(self) -> None:
        """From now on each phase of a step is timed."""
        self._step.clock = ctypes.pointer(self._clock)

    def take_phase_seconds(self) -> dict[str, float]:
        """Of one thread since the last call, by phase; waiting for the others is part of a phase."""
        seconds = dict(zip(PHASES, self._clock.seconds, strict=True))
        self._clock.seconds = type(self._clock.seconds)()
        return seconds

    def _set_plan(self, plan: StepPlan) -> None:
        step = self._step
        step.num_tokens, step.num_decode, step.num_chunks = plan.num_tokens, len(plan.decode), len(plan.chunks)
        step.decode = (c_int64 * len(plan.decode))(*plan.decode)
        chunks = [ChunkStruct(chunk.slot, chunk.start, chunk.end) for chunk in plan.chunks]
        step.chunks = (ChunkStruct * len(chunks))(*chunks)

    def _set_batch(self, batch: BatchState) -> None:
        step = self._step
        step.tokens, step.tokens_stride = batch.tokens.data_ptr(), batch.tokens.stride(0)
        step.tables, step.tables_stride = batch.tables.data_ptr(), batch.tables.stride(0)
        step.lengths, step.num_slots = batch.lengths.data_ptr(), batch.lengths.shape[0]
        self._model.max_positions = batch.max_model_len


def _rounded_bytes(config: ModelConfig, library: NativeLibrary) -> int:
    """Of a token's longest input to a product, rounded for int8 weights."""
    widths = (config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size)
    return max(int(library.rounded_bytes(width)) for width in widths)


def _window(config: ModelConfig, layer: int) -> int:
    return config.window if layer in config.windowed_layers else 0


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _linear(weight: PackedWeight) -> LinearStruct:
    return LinearStruct(
        weight.inputs, weight.outputs, weight.words.data_ptr(), _address(weight.bias), _address(weight.scales)
    )


def _layer(layer: LayerWeights[PackedWeight], window: int) -> LayerStruct:
    return LayerStruct(
        attention_norm=_address(layer.attention_norm),
        query_norm=_address(layer.query_norm),
        key_norm=_address(layer.key_norm),
        mlp_norm=_address(layer.mlp_norm),
        qkv=_linear(layer.qkv),
        attention_out=_linear(layer.attention_out),
        gate_up=_linear(layer.gate_up),
        down=_linear(layer.down),
        window=window,
    )


def _model(
    config: ModelConfig,
    weights: DecoderWeights[PackedWeight],
    rotary: RotaryTable,
    layers: "ctypes.Array[LayerStruct]",
    threads: int,
) -> ModelStruct:
    return ModelStruct(
        num_layers=config.num_layers,
        hidden=config.hidden_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        inner=config.intermediate_size,
        vocab=config.vocab_size,
        eps=config.rms_norm_eps,
        embedding=_address(weights.embedding),
        cosines=_address(rotary.cos),
        sines=_address(rotary.sin),
        final_norm=_address(weights.final_norm),
        head=_linear(weights.lm_head),
        layers=layers,
        threads=threads,
    )

"""KVLayout: everything two workers must agree on before one may read the other's blocks."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields

from tailrace.errors import ConfigError

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
GROUP_KINDS = ("full", "sliding_window")
FINGERPRINT_BYTES = 16
_COUNTS = ("num_layers", "num_kv_heads", "head_dim", "block_size", "tensor_parallel_size")


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that attend alike. `window` is in tokens, 0 for full attention."""

    kind: str
    layers: tuple[int, ...]
    window: int = 0

    def __post_init__(self) -> None:
        if self.kind not in GROUP_KINDS:
            raise _refused("groups", f"kind must be one of {', '.join(GROUP_KINDS)}, not {self.kind!r}")
        if (self.kind == "sliding_window") != (self.window > 0):
            raise _refused("groups", f"window must be {_window_rule(self.kind)}, not {self.window}")

    def __str__(self) -> str:
        window = f"({self.window})" if self.window else ""
        return f"{self.kind}{window}:{','.join(map(str, self.layers))}"


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The meaning of one block's bytes.

    A pool is one contiguous array [num_blocks, layers, 2 (keys, values), kv_heads, block, head_dim], so a block is one
    range of bytes, a run of its layers a sub-range, and a run of heads a range in each layer.

    Raises ConfigError, naming the field, for values that no layout can have.
    """

    model_digest: str
    weights_digest: str
    quantization: str
    """Of the weights; "none" where there is none."""
    numerics_version: int
    """Raised whenever the engine's arithmetic changes: blocks of another version are other blocks."""
    num_layers: int
    num_kv_heads: int
    """Those of this rank."""
    head_dim: int
    block_size: int
    """Tokens a block."""
    kv_dtype: str
    groups: tuple[LayerGroup, ...]
    kv_scales: str = ""
    """Digest of the scales of a quantized cache; empty where it has none."""
    tensor_parallel_rank: int = 0
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise _refused(name, f"must be at least 1, not {getattr(self, name)}")
        if self.kv_dtype not in DTYPE_BYTES:
            raise _refused("kv_dtype", f"must be one of {', '.join(DTYPE_BYTES)}, not {self.kv_dtype!r}")
        if not 0 <= self.tensor_parallel_rank < self.tensor_parallel_size:
            limit = self.tensor_parallel_size - 1
            raise _refused("tensor_parallel_rank", f"must be 0 to {limit}, not {self.tensor_parallel_rank}")
        if sorted(layer for group in self.groups for layer in group.layers) != list(range(self.num_layers)):
            raise _refused("groups", f"must name each of the layers 0 to {self.num_layers - 1} once")

    @property
    def arithmetic(self) -> str:
        """What a worker of this layout computes in, for people: "bfloat16, int8 weights"."""
        return self.kv_dtype if self.quantization == "none" else f"{self.kv_dtype}, {self.quantization} weights"

    @property
    def fingerprint(self) -> bytes:
        """16 bytes over every field. Hashes the fields anew each time: hold on to it in a hot path."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=FINGERPRINT_BYTES).digest()

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """(layers, 2, kv_heads, block, head_dim)"""
        return (self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim)

    @property
    def window(self) -> int:
        """Tokens that every layer attends to at most; 0: some layer attends to all. A block holds all layers."""
        return self.groups[0].window if len(self.groups) == 1 else 0

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.kv_dtype]

    @property
    def block_bytes(self) -> int:
        return self.block_size * self.bytes_per_token

    def differences(self, needer: "KVLayout") -> tuple[str, ...]:
        """Why `needer` cannot read these blocks, as "kv_dtype: owner=float16 needer=bfloat16"; () when it can."""
        pairs = ((field.name, getattr(self, field.name), getattr(needer, field.name)) for field in fields(self))
        return tuple(f"{name}: owner={_text(own)} needer={_text(need)}" for name, own, need in pairs if own != need)


def _text(value: object) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _window_rule(kind: str) -> str:
    return "at least 1 for sliding_window" if kind == "sliding_window" else f"0 for {kind}"


def _refused(field: str, rule: str) -> ConfigError:
    return ConfigError(f"KV layout: {field} {rule}", param=field)

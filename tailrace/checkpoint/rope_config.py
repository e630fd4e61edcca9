"""RopeConfig: how positions rotate queries and keys, read from either form that Hugging Face files have.

transformers 5 writes `rope_parameters`; earlier ones `rope_theta` and `rope_scaling`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tailrace.errors import CheckpointError

_DEFAULT_THETA = 10000.0
_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_Refused = Callable[[str, str], CheckpointError]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Numbers that a kind does not use are 0."""

    theta: float
    kind: str = "default"
    """default, linear or llama3."""
    factor: float = 0.0
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_max_position: int = 0


def read_rope(values: Mapping[str, Any], refused: _Refused) -> RopeConfig:
    """`refused(field, why)` makes the error to raise: for kinds that are not served, and missing or odd numbers."""
    name = "rope_parameters" if values.get("rope_parameters") is not None else "rope_scaling"
    rope = values.get(name) or {}
    if not isinstance(rope, dict):
        raise refused(name, f"must be an object or null, not {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _NUMBERS:
        raise refused(f"{name}.rope_type", f"is {kind!r}; served are {', '.join(_NUMBERS)}")
    _refuse_unknown(rope, name, kind, refused)
    numbers = {field: _number(rope.get(field), f"{name}.{field}", refused) for field in _NUMBERS[kind]}
    if kind == "llama3" and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        raise refused(f"{name}.high_freq_factor", "must be above low_freq_factor")
    return RopeConfig(
        theta=_theta(values, rope, name, refused),
        kind=kind,
        original_max_position=int(numbers.pop("original_max_position_embeddings", 0)),
        **numbers,
    )


def _refuse_unknown(rope: Mapping[str, Any], name: str, kind: str, refused: _Refused) -> None:
    for field, value in rope.items():
        if field == "partial_rotary_factor" and value not in (None, 1, 1.0):
            raise refused(f"{name}.{field}", f"= {value!r} is not supported: whole heads are rotated")
        known = ("rope_type", "type", "rope_theta", "partial_rotary_factor", *_NUMBERS[kind])
        if field not in known and value not in (None, False):
            raise refused(f"{name}.{field}", f"= {value!r} is not supported with rope_type {kind!r}")


def _theta(values: Mapping[str, Any], rope: Mapping[str, Any], name: str, refused: _Refused) -> float:
    if rope.get("rope_theta") is not None:
        return _number(rope["rope_theta"], f"{name}.rope_theta", refused)
    return _number(values.get("rope_theta", _DEFAULT_THETA), "rope_theta", refused)


def _number(value: object, field: str, refused: _Refused) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise refused(field, f"must be a number above 0, not {value!r}")
    return float(value)

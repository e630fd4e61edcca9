import dataclasses

import pytest

from tailrace.errors import ConfigError
from tailrace.kv.layout import KVLayout, LayerGroup


def make_layout(**changes: object) -> KVLayout:
    """SmolLM2-135M's shape; `changes` are fields to set otherwise."""
    layout = KVLayout(
        model_digest="model",
        weights_digest="weights",
        quantization="none",
        numerics_version=1,
        num_layers=30,
        num_kv_heads=3,
        head_dim=64,
        block_size=16,
        kv_dtype="bfloat16",
        groups=(LayerGroup("full", tuple(range(30))),),
    )
    return dataclasses.replace(layout, **changes)


OTHERS = {
    "model_digest": "other",
    "weights_digest": "other",
    "quantization": "int8",
    "numerics_version": 2,
    "num_kv_heads": 6,
    "head_dim": 32,
    "block_size": 32,
    "kv_dtype": "float16",
    "groups": (LayerGroup("sliding_window", tuple(range(30)), window=4096),),
    "kv_scales": "other",
    "tensor_parallel_size": 2,
}


def test_sizes_are_those_of_the_physical_pool() -> None:
    layout = make_layout()
    assert layout.block_shape == (30, 2, 3, 16, 64)
    assert layout.bytes_per_token == 23_040
    assert layout.block_bytes == 368_640
    assert make_layout(kv_dtype="float32").block_bytes == 2 * 368_640


def test_fingerprint_is_16_bytes_and_stable() -> None:
    assert make_layout().fingerprint.hex() == "96b486550b15f7b19b982958096b3b5b"
    assert make_layout() == make_layout()


@pytest.mark.parametrize(("field", "value"), OTHERS.items())
def test_every_field_changes_the_fingerprint_and_is_named(field: str, value: object) -> None:
    owner, needer = make_layout(), make_layout(**{field: value})
    assert owner.fingerprint != needer.fingerprint
    (difference,) = owner.differences(needer)
    assert difference.startswith(f"{field}: owner=")


def test_every_field_is_covered_above() -> None:
    names = {field.name for field in dataclasses.fields(KVLayout)}
    # The number of layers cannot change alone, nor a rank in a group of one: next test.
    assert names - set(OTHERS) == {"num_layers", "tensor_parallel_rank"}


def test_layers_and_ranks_are_told_apart() -> None:
    fewer = make_layout(num_layers=2, groups=(LayerGroup("full", (0, 1)),))
    assert make_layout().differences(fewer)[0] == "num_layers: owner=30 needer=2"
    first, second = (make_layout(tensor_parallel_size=2, tensor_parallel_rank=rank) for rank in (0, 1))
    assert first.differences(second) == ("tensor_parallel_rank: owner=0 needer=1",)
    assert first.fingerprint != second.fingerprint


def test_differences_name_owner_and_needer() -> None:
    assert make_layout().differences(make_layout()) == ()
    owner = make_layout(kv_dtype="float16", block_size=32)
    assert owner.differences(make_layout()) == (
        "block_size: owner=32 needer=16",
        "kv_dtype: owner=float16 needer=bfloat16",
    )


def test_differences_spell_groups_out() -> None:
    mixed = (LayerGroup("full", (0,)), LayerGroup("sliding_window", (1,), window=64))
    owner = make_layout(num_layers=2, groups=mixed)
    needer = make_layout(num_layers=2, groups=(LayerGroup("full", (0, 1)),))
    assert owner.differences(needer) == ("groups: owner=full:0+sliding_window(64):1 needer=full:0,1",)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("num_layers", 0, "at least 1"),
        ("num_kv_heads", 0, "at least 1"),
        ("head_dim", -1, "at least 1"),
        ("block_size", 0, "at least 1"),
        ("kv_dtype", "int4", "bfloat16, float16, float32"),
        ("tensor_parallel_rank", 1, "0 to 0"),
        ("tensor_parallel_size", 0, "at least 1"),
        ("groups", (), "each of the layers 0 to 29 once"),
        ("groups", (LayerGroup("full", (*range(30), 3)),), "each of the layers 0 to 29 once"),
    ],
)
def test_impossible_values_are_refused_by_name(field: str, value: object, rule: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} must .*{rule}") as caught:
        make_layout(**{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize(("kind", "window"), [("full", 8), ("sliding_window", 0), ("mamba", 0)])
def test_impossible_groups_are_refused(kind: str, window: int) -> None:
    with pytest.raises(ConfigError, match="groups"):
        LayerGroup(kind, (0,), window=window)


def test_what_is_computed_in_is_said_in_words() -> None:
    assert make_layout(kv_dtype="bfloat16").arithmetic == "bfloat16"
    assert make_layout(kv_dtype="bfloat16", quantization="int8").arithmetic == "bfloat16, int8 weights"

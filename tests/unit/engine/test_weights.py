"""Reading safetensors: names, shapes, damage, digests."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tailrace.engine.weights import DummySource, SafetensorsSource
from tailrace.errors import CheckpointError

SHAPES = {"a.weight": (3, 4), "b.weight": (5,), "c.weight": (2, 2)}


def tensors() -> dict[str, torch.Tensor]:
    return {
        name: torch.arange(float(torch.Size(shape).numel())).view(shape).bfloat16() for name, shape in SHAPES.items()
    }


def save_sharded(directory: Path) -> Path:
    given = tensors()
    files = {"one.safetensors": ["a.weight"], "two.safetensors": ["b.weight", "c.weight"]}
    for file, names in files.items():
        save_file({name: given[name] for name in names}, directory / file)
    index = {"weight_map": {name: file for file, names in files.items() for name in names}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def save_single(directory: Path, given: dict[str, torch.Tensor] | None = None) -> Path:
    save_file(given or tensors(), directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("save", [save_single, save_sharded])
def test_tensors_are_read_as_they_were_written(tmp_path: Path, save) -> None:
    source = SafetensorsSource(save(tmp_path), SHAPES)
    for name, expected in tensors().items():
        assert torch.equal(source.tensor(name), expected)
        assert source.tensor(name).dtype == torch.bfloat16


def test_digest_sees_contents_and_not_files(tmp_path: Path) -> None:
    directories = [tmp_path / name for name in ("single", "sharded", "other", "float32")]
    for directory in directories:
        directory.mkdir()
    other = {**tensors(), "b.weight": torch.ones(5).bfloat16()}
    wide = {name: tensor.float() for name, tensor in tensors().items()}
    saved = (
        save_single(directories[0]),
        save_sharded(directories[1]),
        save_single(directories[2], other),
        save_single(directories[3], wide),
    )
    single, sharded, changed, widened = (SafetensorsSource(directory, SHAPES).digest for directory in saved)
    assert single == sharded
    assert len({single, changed, widened}) == 3


@pytest.mark.parametrize("at", [0, 30_000, 59_999])
def test_digest_samples_start_middle_and_end(tmp_path: Path, at: int) -> None:
    digests = []
    for value in (0.0, 1.0):
        tensor = torch.zeros(60_000)
        tensor[at] = value
        digests.append(SafetensorsSource(save_single(tmp_path, {"x": tensor}), {"x": (60_000,)}).digest)
    assert digests[0] != digests[1]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({**SHAPES, "d.weight": (1,), "e.weight": (1,)}, r"are missing: d\.weight, e\.weight"),
        ({"a.weight": (3, 4)}, r"not part of this architecture: b\.weight, c\.weight"),
        ({**SHAPES, "a.weight": (4, 3)}, r"a\.weight has shape \(3, 4\), config\.json asks for \(4, 3\)"),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        SafetensorsSource(save_single(tmp_path), shapes)


def test_ignored_tensors_may_be_there_or_not(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if name != "c.weight"}
    SafetensorsSource(save_single(tmp_path), shapes, ignored=["c.weight", "d.weight"])


def test_an_odd_dtype_is_named(tmp_path: Path) -> None:
    given = {**tensors(), "b.weight": torch.ones(5, dtype=torch.int64)}
    with pytest.raises(CheckpointError, match=r"b\.weight is I64"):
        SafetensorsSource(save_single(tmp_path, given), SHAPES)


@pytest.mark.parametrize("kept", [0, 4, 8, 20, -1])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    path = save_single(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: (truncated|cannot be mapped)"):
        SafetensorsSource(tmp_path, SHAPES)


def _with_header(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-2, 4]}}',
    ],
)
def test_a_corrupt_header_is_named(tmp_path: Path, header: bytes) -> None:
    _with_header(tmp_path / "model.safetensors", header, bytes(4))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*corrupt"):
        SafetensorsSource(tmp_path, {"a": (1,)})


def test_trailing_bytes_are_refused(tmp_path: Path) -> None:
    path = save_single(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="corrupt"):
        SafetensorsSource(tmp_path, SHAPES)


def test_no_weights_and_missing_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="only safetensors is served"):
        SafetensorsSource(tmp_path, SHAPES)
    save_sharded(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"two\.safetensors: is missing"):
        SafetensorsSource(tmp_path, SHAPES)


@pytest.mark.parametrize("index", ["{", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../x.safetensors"}}'])
def test_an_odd_index_is_named(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        SafetensorsSource(tmp_path, SHAPES)


def test_dummy_weights_are_the_same_everywhere() -> None:
    shapes = {"x.weight": (40, 50), "y_norm.weight": (3,)}
    one, other = DummySource(shapes), DummySource(dict(reversed(shapes.items())))
    assert torch.equal(one.tensor("x.weight"), other.tensor("x.weight"))
    assert torch.equal(one.tensor("y_norm.weight"), torch.ones(3))
    assert one.tensor("x.weight").std() == pytest.approx(0.02, rel=0.1)
    assert one.digest == other.digest
    assert one.digest != DummySource({**shapes, "y_norm.weight": (4,)}).digest

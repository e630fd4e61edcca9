"""What a model may be called, and what a directory must hold."""

import json
from pathlib import Path

import pytest

from tailrace.checkpoint.cache_dir import default_cache_dir
from tailrace.checkpoint.resolve import resolve_model
from tailrace.errors import CheckpointError


def make_directory(path: Path, *names: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        (path / name).write_text("{}")
    return path


def test_a_complete_directory_is_itself(tmp_path: Path) -> None:
    make_directory(tmp_path, "config.json", "tokenizer.json", "weights.safetensors")
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("config.json", "model.safetensors"), "lacks tokenizer.json$"),
        (("tokenizer.json", "model.safetensors"), "lacks config.json$"),
        (("config.json", "tokenizer.json", "pytorch_model.bin"), r"lacks \*.safetensors$"),
        ((), r"lacks config.json, tokenizer.json, \*.safetensors$"),
    ],
)
def test_an_incomplete_directory_names_what_is_missing(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    make_directory(tmp_path, *names)
    with pytest.raises(CheckpointError, match=message):
        resolve_model(str(tmp_path))


def test_a_shard_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    make_directory(tmp_path, "config.json", "tokenizer.json", "a.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"lacks b.safetensors$"):
        resolve_model(str(tmp_path))
    make_directory(tmp_path, "b.safetensors")
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"x": 1, "y": "a"}}'])
def test_an_unreadable_index_is_named(tmp_path: Path, content: str) -> None:
    make_directory(tmp_path, "config.json", "tokenizer.json", "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index.json is not a readable safetensors index"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["", "nothing", "a/b/c", "/no/such/directory", "../up", "org/", "org/na me"])
def test_a_name_that_is_nothing_says_what_it_could_be(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"neither a directory, nor one of smollm2-135m-instruct, nor org/name"):
        resolve_model(name)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(CheckpointError, match="it is a file"):
        resolve_model(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    ("variable", "expected"),
    [("/x", "/x/tailrace"), ("", "/home/h/.cache/tailrace"), ("rel", "/home/h/.cache/tailrace")],
)
def test_the_cache_follows_the_xdg_specification(monkeypatch: pytest.MonkeyPatch, variable: str, expected: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", variable)
    monkeypatch.setenv("HOME", "/home/h")
    assert default_cache_dir() == Path(expected)

"""org/name, against a hub on loopback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tailrace.checkpoint.hub import fetch_from_hub, wanted_files
from tailrace.errors import CheckpointError
from tests.helpers.fake_hub import FakeHub, FakeRepo, running_hub

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b'{"bos_token": null}',
    "model.safetensors": b"weights" * 1000,
    "pytorch_model.bin": b"pickle",
    "README.md": b"words",
}


def ignore(what: str, done: int, total: int) -> None:
    pass


def fetch(hub: FakeHub, tmp_path: Path, name: str = "org/model", revision: str | None = None) -> Path:
    return fetch_from_hub(name, revision=revision, progress=ignore, endpoint=hub.endpoint, cache_dir=tmp_path)


def test_only_what_serving_needs_is_fetched(tmp_path: Path) -> None:
    with running_hub({"org/model": FakeRepo(FILES)}) as hub:
        path = fetch(hub, tmp_path)
    expected = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(hub.served) == expected
    assert sorted(file.name for file in path.iterdir()) == expected
    assert (path / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_a_second_time_fetches_nothing(tmp_path: Path) -> None:
    with running_hub({"org/model": FakeRepo(FILES)}) as hub:
        first = fetch(hub, tmp_path)
        hub.served.clear()
        assert fetch(hub, tmp_path) == first
        assert hub.served == []


def test_progress_ends_at_the_bytes_of_the_wanted_files(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    with running_hub({"org/model": FakeRepo(FILES)}) as hub:
        fetch_from_hub("org/model", progress=lambda *step: seen.append(step), endpoint=hub.endpoint, cache_dir=tmp_path)
    total = sum(len(FILES[name]) for name in hub.served)
    assert seen[-1] == ("downloading", total, total)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_a_revision_is_pinned(tmp_path: Path) -> None:
    repo = FakeRepo(FILES, tags={"v1": "tag"})
    with running_hub({"org/model": repo}) as hub:
        assert fetch(hub, tmp_path, revision=repo.commit).name == repo.commit
        assert fetch(hub, tmp_path, revision="v1").name == repo.commit
        with pytest.raises(CheckpointError, match="org/model on the hub has no revision 'v9'"):
            fetch(hub, tmp_path, revision="v9")


def test_an_unknown_repository_is_refused_by_name(tmp_path: Path) -> None:
    with running_hub({}) as hub, pytest.raises(CheckpointError, match="no model 'org/none'"):
        fetch(hub, tmp_path, "org/none")


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository_says_what_to_do(tmp_path: Path, status: int) -> None:
    gated = FakeRepo(FILES, refusal=(status, "GatedRepo"))
    with running_hub({"org/model": gated}) as hub, pytest.raises(CheckpointError, match=r"is gated.*HF_TOKEN"):
        fetch(hub, tmp_path)


@pytest.mark.parametrize("status", [401, 403])
def test_a_forbidden_repository_is_no_network_trouble(tmp_path: Path, status: int) -> None:
    closed = FakeRepo(FILES, refusal=(status, ""))
    with running_hub({"org/model": closed}) as hub, pytest.raises(CheckpointError, match="refuses access to org/model"):
        fetch(hub, tmp_path)


@pytest.mark.parametrize(
    ("gone", "message"),
    [("model.safetensors", "no .*safetensors"), ("tokenizer.json", "lacks tokenizer.json")],
)
def test_a_repository_that_cannot_serve_is_refused_before_fetching(tmp_path: Path, gone: str, message: str) -> None:
    files = {name: body for name, body in FILES.items() if name != gone}
    with running_hub({"org/model": FakeRepo(files)}) as hub:
        with pytest.raises(CheckpointError, match=message):
            fetch(hub, tmp_path)
        assert hub.served == []


def test_an_unreachable_hub_is_named_unless_the_model_was_fetched_before(tmp_path: Path) -> None:
    with running_hub({"org/model": FakeRepo(FILES)}) as hub:
        path = fetch(hub, tmp_path)
    assert fetch(hub, tmp_path) == path
    with pytest.raises(CheckpointError, match="cannot fetch org/other from the hub, and it was not fetched before"):
        fetch(hub, tmp_path, "org/other")


def test_a_failing_hub_is_no_reason_to_refuse_what_is_here(tmp_path: Path) -> None:
    repo = FakeRepo(FILES)
    with running_hub({"org/model": repo}) as hub:
        path = fetch(hub, tmp_path)
        repo.refusal = (500, "")
        assert fetch(hub, tmp_path) == path


def test_hf_endpoint_is_honoured(tmp_path: Path) -> None:
    code = "from tailrace.checkpoint.resolve import resolve_model; print(resolve_model('org/model'))"
    with running_hub({"org/model": FakeRepo(FILES)}) as hub:
        env = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert (Path(done.stdout.strip()) / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_doubled_weights_are_fetched_once_and_folders_not_at_all() -> None:
    names = [
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "consolidated.safetensors",
        "original/model.safetensors",
        "config.json",
        "onnx/config.json",
        "chat_template.jinja",
    ]
    assert wanted_files(names) == sorted(name for name in names if "/" not in name and "consolidated" not in name)

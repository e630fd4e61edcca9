"""Which implementation is chosen, and what is said when it is the slow one."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tailrace.engine.engine import EngineOptions, load_engine
from tailrace.engine.kernels.rms_norm import rms_norm
from tailrace.engine.models.decoder import Decoder, DecoderWeights
from tailrace.engine.models.linear import PlainLinear
from tailrace.engine.models.quantization import HEAD_SHARE, RoundedLinear, round_weight
from tailrace.engine.native.decoder import NativeDecoder
from tailrace.errors import ConfigError
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


def test_int8_is_named_in_the_layout_with_and_without_kernels(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL_CONFIG))
    for native in (True, False):
        options = {"load_format": "dummy", "device": "cpu", "kv_cache_bytes": 1 << 20, "native": native}
        engine = load_engine(EngineOptions(tmp_path, quantization="int8", **options))
        assert engine.layout.quantization == "int8"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("native", [True, False])
def test_a_rounded_head_leaves_the_likeliest_tokens_to_its_own_weights(
    native: bool, dtype: str, tmp_path: Path
) -> None:
    model: Any = model_of(tmp_path, dtype=dtype, quantization="int8", native=native)
    weights: DecoderWeights[Any] = model._kept[0] if native else model._weights
    hidden = torch.randn(16, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    normed = rms_norm(hidden, weights.final_norm, model.config.rms_norm_eps).to(weights.embedding.dtype)
    exact = normed.float() @ weights.lm_head_rows.float().T
    with torch.inference_mode():
        logits = model.logits(hidden)
    best = logits.amax(-1, keepdim=True)
    is_near = logits >= best - best.abs() * HEAD_SHARE
    error = (logits - exact).abs() / exact.std()
    assert torch.equal(logits.argmax(-1), exact.argmax(-1))
    assert error[is_near].max() < (0.03 if dtype == "bfloat16" else 1e-5)
    assert 1e-3 < error[~is_near].max() < 0.2


@pytest.mark.parametrize(("name", "value"), [("quantization", "int4"), ("device", "cuda")])
def test_a_quantization_that_is_not_served_is_refused(tmp_path: Path, name: str, value: str) -> None:
    with pytest.raises(ConfigError, match="quantization") as caught:
        model_of(tmp_path, **{"quantization": "int8", name: value})
    assert caught.value.param == "quantization"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rounded_linear_rounds_nothing_but_its_weight(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(70, 96).to(dtype), torch.randn(70).to(dtype), torch.randn(5, 96).to(dtype) * 20
    weight[3] = 0
    rounded = round_weight(weight)
    exact = x.double() @ (rounded.values.double() * rounded.scales.double()[:, None]).T + bias.double()
    actual = RoundedLinear(weight, bias, PlainLinear)(x)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), exact, rtol=2e-2, atol=1.0 if dtype != torch.float32 else 1e-3)
    assert (rounded.values.abs().amax(1) == 127).sum() == 69
    assert (
        (weight.double() - rounded.values.double() * rounded.scales.double()[:, None]).abs().amax(1)
        <= rounded.scales.double() * 0.5001
    ).all()

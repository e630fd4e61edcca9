"""load_engine: options checked by name, sizes derived from the model, layouts that agree between workers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tailrace.engine.engine import EngineOptions, load_engine
from tailrace.engine.models.linear import PackedLinear, PlainLinear, can_pack, linear_maker
from tailrace.errors import CheckpointError, ConfigError
from tests.helpers.model_files import MISTRAL_CONFIG


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL_CONFIG))
    return tmp_path


def options(directory: Path, **chosen: Any) -> EngineOptions:
    return EngineOptions(directory, **{"load_format": "dummy", "device": "cpu", "kv_cache_bytes": 1 << 20, **chosen})


def test_sizes_follow_from_the_model_and_the_memory(directory: Path) -> None:
    engine = load_engine(options(directory))
    assert engine.max_model_len == 256
    assert engine.layout.kv_dtype == "bfloat16"
    assert engine.layout.block_shape == (2, 2, 2, 16, 8)
    assert engine.cache.num_blocks == (1 << 20) // engine.layout.block_bytes
    assert str(engine.layout.groups[0]) == "sliding_window(64):0,1"


def test_the_pool_is_page_aligned_host_memory(directory: Path) -> None:
    cache = load_engine(options(directory, num_blocks=20)).cache
    assert cache.address % 4096 == 0
    assert len(cache.memory) == 20 * cache.block_bytes
    assert not cache.memory.readonly
    cache.memory[3 * cache.block_bytes : 4 * cache.block_bytes] = b"\x80\x3f" * (cache.block_bytes // 2)
    assert (cache.tensor[3] == 1.0).all()
    assert (cache.tensor[[2, 4]] == 0.0).all()
    cache.copy_block(3, 7)
    assert torch.equal(cache.tensor[7], cache.tensor[3])


def test_workers_of_one_model_agree_on_the_layout(directory: Path) -> None:
    one, other = (load_engine(options(directory, num_blocks=count)).layout for count in (16, 40))
    assert one.fingerprint == other.fingerprint
    wide = load_engine(options(directory, dtype="float32")).layout
    assert one.differences(wide) == ("kv_dtype: owner=bfloat16 needer=float32",)


def test_progress_ends_at_the_total(directory: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    load_engine(options(directory), progress=lambda *report: seen.append(report))
    done = [report[1] for report in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1][2] == seen[0][2] > 0


@pytest.mark.parametrize(
    ("chosen", "param", "numbers"),
    [
        ({"max_model_len": 257}, "max_model_len", ("256", "257")),
        ({"max_model_len": 0}, "max_model_len", ("256", "0")),
        ({"num_blocks": 5}, "num_blocks", ("5", "6")),  # for a window of 64 tokens, not for all 256
        ({"max_model_len": 1, "num_blocks": 1}, "num_blocks", ("1", "2")),
        ({"kv_cache_bytes": 1000}, "kv_cache_bytes", ("1000", str(6 * 2048))),
        ({"block_size": 0}, "block_size", ("0",)),
        ({"max_num_seqs": 0}, "max_num_seqs", ("0",)),
        ({"num_threads": 0}, "num_threads", ("0",)),
        ({"dtype": "int8"}, "dtype", ("int8",)),
        ({"load_format": "pickle"}, "load_format", ("pickle",)),
        ({"device": "tpu"}, "device", ("tpu",)),
    ],
)
def test_wrong_options_are_named_with_their_limits(
    directory: Path, chosen: dict[str, Any], param: str, numbers: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_engine(options(directory, **chosen))
    assert caught.value.param == param
    for text in (param, *numbers):
        assert text in caught.value.message


def test_a_device_that_is_not_there_is_named(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="sees no CUDA device") as caught:
        load_engine(options(directory, device="cuda"))
    assert caught.value.param == "device"


def test_missing_weights_are_a_checkpoint_error(directory: Path) -> None:
    with pytest.raises(CheckpointError, match="safetensors"):
        load_engine(options(directory, load_format="auto"))


@pytest.mark.skipif(not can_pack(torch.float32), reason="this build of torch has no oneDNN")
@pytest.mark.parametrize("rows", [0, 1, 2, 15, 16, 17, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_linear_layers_are_right_for_any_batch(rows: int, dtype: torch.dtype) -> None:
    if not can_pack(dtype):
        pytest.skip("this processor has no oneDNN for the dtype")
    generator = torch.Generator().manual_seed(rows)
    weight, bias = torch.randn(72, 40, generator=generator).to(dtype), torch.randn(72, generator=generator).to(dtype)
    x = torch.randn(rows, 40, generator=generator).to(dtype)
    with torch.inference_mode():
        packed, plain = PackedLinear(weight, bias)(x), PlainLinear(weight, bias)(x)
    torch.testing.assert_close(packed, plain, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


def test_going_without_packing_is_loud(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert linear_maker(torch.bfloat16, torch.device("cpu")) is PlainLinear
    assert "unpacked" in caplog.text

"""Two workers of different layouts are never paired: the field is named, and nobody hangs."""

from pathlib import Path

import pytest

from tests.helpers.cluster import Cluster
from tests.helpers.tiny_model import make_tiny_model
from tests.helpers.traffic import prompt_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    ("option", "ours", "theirs", "difference"),
    [
        ("dtype", "float32", "bfloat16", "kv_dtype: owner=float32 needer=bfloat16"),
        ("block_size", 16, 32, "block_size: owner=16 needer=32"),
        ("quantization", "int8", "none", "quantization: owner=int8 needer=none"),
    ],
)
def test_workers_of_different_layouts(
    small_model: Path, option: str, ours: object, theirs: object, difference: str
) -> None:
    with Cluster(small_model, num_blocks=256) as cluster:
        cluster.start("prefill", "prefill-0", **{"dtype": "float32", option: ours})
        cluster.start("decode", "decode-0", **{"dtype": "float32", option: theirs})
        cluster.wait_for("prefill-0", "decode-0")
        ready = cluster.get("/ready")
        assert ready.status_code == 503
        assert difference in " ".join(ready.json()["reasons"])
        assert difference in cluster.process("gateway").said()
        # The decode worker can still do without the other one, and does.
        answer = cluster.post("/v1/completions", prompt=prompt_of(100, 1), max_tokens=4, ignore_eos=True)
        assert answer.status_code == 200
        assert answer.json()["usage"]["tailrace"]["transport"] is None
        # One that fits mends it, and the misfit stays unused.
        cluster.start("prefill", "prefill-1", **{"dtype": "float32", option: theirs})
        cluster.wait_for("prefill-0", "prefill-1", "decode-0")
        assert cluster.get("/ready").status_code == 200
        answer = cluster.post("/v1/completions", prompt=prompt_of(100, 2), max_tokens=4, ignore_eos=True)
        assert answer.json()["usage"]["tailrace"]["transport"] == "nixl"
        assert cluster.ledgers()["prefill-0"].cached == 0
        cluster.wait_until_idle(2.0)


def test_a_worker_of_another_model_is_refused(small_model: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", seed=1)
    config = other / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-06'))
    with Cluster(small_model, dtype="float32", num_blocks=256) as cluster:
        cluster.start("decode", "stranger", model=other)
        cluster.wait_until(lambda: "model_digest" in cluster.process("gateway").said(), "the gateway says why")
        assert cluster.workers() == set()
        assert cluster.get("/ready").status_code == 503
        assert cluster.post("/v1/completions", prompt="hi").status_code == 503


def test_weights_of_another_training_are_not_paired(small_model: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", seed=1)
    with Cluster(small_model, dtype="float32", num_blocks=256) as cluster:
        cluster.start("prefill", "prefill-0", model=other)
        cluster.start("decode", "decode-0")
        cluster.wait_for("prefill-0", "decode-0")
        assert "weights_digest" in " ".join(cluster.get("/ready").json()["reasons"])

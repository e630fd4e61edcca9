"""Two workers of different layouts are never paired: the field is named, and nobody hangs."""

from pathlib import Path

import pytest

from tests.helpers.cluster import Cluster
from tests.helpers.tiny_model import make_tiny_model
from tests.helpers.traffic import prompt_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def test_workers_of_different_layouts(small_model: Path, tmp_path: Path) -> None:
    """Each decode worker differs from the one prefill worker in something else."""
    misfits: dict[str, tuple[dict[str, object], str]] = {
        "decode-0": ({"dtype": "bfloat16"}, "kv_dtype: owner=float32 needer=bfloat16"),
        "decode-1": ({"block_size": 32}, "block_size: owner=16 needer=32"),
        "decode-2": ({"quantization": "int8"}, "quantization: owner=none needer=int8"),
        "decode-3": ({"model": make_tiny_model(tmp_path / "other", seed=1)}, "weights_digest"),
    }
    with Cluster(small_model, dtype="float32", num_blocks=256) as cluster:
        cluster.start("prefill", "prefill-0")
        for name, (options, _) in misfits.items():
            cluster.start("decode", name, **options)
        cluster.wait_for("prefill-0", *misfits)
        ready = cluster.get("/ready")
        assert ready.status_code == 503
        for name, (_, difference) in misfits.items():
            [reason] = [reason for reason in ready.json()["reasons"] if reason.startswith(name)]
            assert difference in reason
            assert difference in cluster.process("gateway").said()
        # They can still do without the other one, and do.
        answer = cluster.post("/v1/completions", prompt=prompt_of(100, 1), max_tokens=4, ignore_eos=True)
        assert answer.status_code == 200
        assert answer.json()["usage"]["tailrace"]["transport"] is None
        for name in ("decode-1", "decode-2", "decode-3"):
            assert cluster.process(name).end() == 0
        # One that fits mends it, and the misfit stays unused.
        cluster.start("prefill", "prefill-1", dtype="bfloat16")
        cluster.wait_for("prefill-0", "prefill-1", "decode-0")
        assert cluster.get("/ready").status_code == 200
        answer = cluster.post("/v1/completions", prompt=prompt_of(400, 2), max_tokens=4, ignore_eos=True)
        assert answer.json()["usage"]["tailrace"]["transport"] == "nixl"
        assert cluster.ledgers()["prefill-0"].cached == 0
        cluster.wait_until_idle(5.0)


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

"""Values of `tailrace.messages` with everything set that a test does not care about."""

from tailrace.kv.layout import KVLayout, LayerGroup
from tailrace.messages import KvSource, Submission, WorkerInfo
from tailrace.types import Role, SamplingParams

SECRET = b"cluster secret of a test"
VOCAB_SIZE = 1 << 20


def make_layout(**fields: object) -> KVLayout:
    values: dict[str, object] = {
        "model_digest": "m1",
        "weights_digest": "w1",
        "quantization": "none",
        "numerics_version": 1,
        "num_layers": 2,
        "num_kv_heads": 1,
        "head_dim": 4,
        "block_size": 4,
        "kv_dtype": "float32",
        "groups": (LayerGroup("full", (0, 1)),),
    }
    return KVLayout(**{**values, **fields})  # type: ignore[arg-type]


def make_info(role: Role = Role.DECODE, **fields: object) -> WorkerInfo:
    values: dict[str, object] = {
        "worker_id": "w",
        "epoch": 7,
        "role": role,
        "layout": make_layout(),
        "model": "tiny",
        "max_model_len": 64,
        "max_num_seqs": 4,
        "num_blocks": 16,
        "address": "127.0.0.1:1",
        "version": "0",
    }
    return WorkerInfo(**{**values, **fields})  # type: ignore[arg-type]


def make_submission(handle: int = 1, **fields: object) -> Submission:
    values: dict[str, object] = {
        "handle": handle,
        "request_id": f"r{handle}",
        "attempt": 0,
        "tokens": list(range(100, 110)),
        "num_prompt_tokens": 10,
        "sampling": SamplingParams(max_tokens=4, ignore_eos=True, seed=3),
        "choices": (0,),
        "priority": 0,
        "deadline_s": 30.0,
    }
    return Submission(**{**values, **fields})  # type: ignore[arg-type]


def make_source(**fields: object) -> KvSource:
    values: dict[str, object] = {"worker_id": "p", "epoch": 3, "address": "127.0.0.1:2", "ticket": b"t"}
    return KvSource(**{**values, **fields})  # type: ignore[arg-type]

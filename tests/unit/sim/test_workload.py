import gzip
import json
from pathlib import Path

import pytest

from tailrace.sim.generate import GENERATORS, generate
from tailrace.sim.profile import PROFILES
from tailrace.sim.workload import MAX_LINE_BYTES, Workload, WorkloadError, read_trace

GOOD = {"timestamp": 1000, "input_length": 1100, "output_length": 7, "hash_ids": [0, 1, 2]}


def write_trace(directory: Path, *lines: object) -> Path:
    path = directory / "trace.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_a_trace_is_read_in_the_order_of_arrival(tmp_path: Path) -> None:
    early = GOOD | {"timestamp": 0, "hash_ids": [0, 1, 9]}
    workload = read_trace(write_trace(tmp_path, GOOD, "", early))
    first, second = workload.requests
    assert (first.arrival_s, second.arrival_s, workload.duration_s) == (0.0, 1.0, 1.0)
    assert (second.num_prompt_tokens, second.num_output_tokens) == (1100, 7)
    assert first.hashes[:2] == second.hashes[:2]
    assert first.hashes[2] != second.hashes[2]
    # 2 of 3 blocks the second time, of 512 tokens each.
    assert workload.oracle_hit_rate() == pytest.approx(1024 / 2200)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestamp": -1}, "timestamp must be milliseconds from 0 to 1e+12, got -1"),
        ({"timestamp": "0"}, "timestamp must be milliseconds from 0 to 1e+12, got '0'"),
        ({"timestamp": float("nan")}, "timestamp must be milliseconds from 0 to 1e+12, got nan"),
        ({"input_length": 0}, "input_length must be an integer from 1 to 10000000, got 0"),
        ({"input_length": 1100.0}, "input_length must be an integer from 1 to 10000000, got 1100.0"),
        ({"input_length": 10**9}, "input_length must be an integer from 1 to 10000000, got 1000000000"),
        ({"output_length": True}, "output_length must be an integer from 0 to 10000000, got True"),
        ({"hash_ids": [0, 1, 2, 3]}, "hash_ids must be a list of 3 ids (1100 tokens in blocks of 512), got 4"),
        ({"hash_ids": [0]}, "hash_ids must be a list of 3 ids (1100 tokens in blocks of 512), got 1"),
        ({"hash_ids": 5}, "hash_ids must be a list of 3 ids (1100 tokens in blocks of 512), got 5"),
        ({"hash_ids": [0, 1, "x"]}, "hash_ids must be integers from 0 to 18446744073709551615, got 'x'"),
        ({"hash_ids": [0, 1, -2]}, "hash_ids must be integers from 0 to 18446744073709551615, got -2"),
    ],
)
def test_a_broken_line_is_named_with_its_field(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(WorkloadError) as raised:
        read_trace(write_trace(tmp_path, GOOD, GOOD | changes))
    assert raised.value.message == f"trace line 2: {message}"
    assert raised.value.param == next(iter(changes))


@pytest.mark.parametrize("name", GOOD)
def test_a_missing_field_is_named(tmp_path: Path, name: str) -> None:
    record = {key: value for key, value in GOOD.items() if key != name}
    with pytest.raises(WorkloadError, match=f"trace line 1: {name} is missing"):
        read_trace(write_trace(tmp_path, record))


@pytest.mark.parametrize(("line", "why"), [("{", "not JSON"), ("[" * 100_000, "not JSON"), ("[1]", "a JSON object")])
def test_what_is_no_object_is_refused(tmp_path: Path, line: str, why: str) -> None:
    with pytest.raises(WorkloadError, match=f"trace line 1: .*{why}"):
        read_trace(write_trace(tmp_path, line))


def test_a_trace_that_is_empty_or_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="no requests in it"):
        read_trace(write_trace(tmp_path, ""))
    with pytest.raises(WorkloadError, match="No such file"):
        read_trace(tmp_path / "nowhere")
    with pytest.raises(WorkloadError, match="Is a directory"):
        read_trace(tmp_path)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (b'{"x": "\xff"}', "not JSON: 'utf-8' codec can't decode byte 0xff"),
        (gzip.compress(b"{}"), "compressed by gzip; unpack it first"),
        (b'{"timestamp": 1' + b"0" * 5000 + b"}", "not JSON: Exceeds the limit"),
        (b"[" + b" " * MAX_LINE_BYTES, f"at most {MAX_LINE_BYTES} bytes"),
    ],
)
def test_a_line_that_is_no_text_or_too_long_is_named(tmp_path: Path, second: bytes, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + second)
    with pytest.raises(WorkloadError, match=f"trace line 2: {message}"):
        read_trace(path)


def test_arrivals_that_are_all_but_one_instant_are_not_stretched_beyond_numbers(tmp_path: Path) -> None:
    workload = read_trace(write_trace(tmp_path, GOOD | {"timestamp": 0}, GOOD | {"timestamp": 5e-320}))
    assert workload.at_load(0.7, 8, PROFILES["h100"]) is workload


def test_a_partial_last_block_needs_no_name(tmp_path: Path) -> None:
    assert len(read_trace(write_trace(tmp_path, GOOD | {"hash_ids": [0, 1]})).requests[0].hashes) == 2


def test_load_is_prefill_seconds_without_a_cache_over_the_workers_time() -> None:
    profile = PROFILES["h100"]
    workload = generate("chat", 300, 512, seed=3)
    moved = workload.at_load(0.5, 4, profile)
    offered_s = sum(profile.prefill_s(0, request.num_prompt_tokens) for request in workload.requests)
    assert offered_s / (4 * moved.duration_s) == pytest.approx(0.5)
    assert moved.requests[0].arrival_s == 0.0
    one = Workload(workload.requests[:1], 512)
    assert one.at_load(0.5, 4, profile) is one


@pytest.mark.parametrize("kind", GENERATORS)
def test_generated_workloads_depend_on_their_seed_alone_and_are_well_formed(kind: str) -> None:
    workload = generate(kind, 500, 512, seed=1)
    assert workload == generate(kind, 500, 512, seed=1)
    assert workload != generate(kind, 500, 512, seed=2)
    assert len(workload.requests) == 500
    arrivals = [request.arrival_s for request in workload.requests]
    assert arrivals == sorted(arrivals)
    assert all(len(r.hashes) == -(-r.num_prompt_tokens // 512) for r in workload.requests)
    parents: dict[bytes, bytes] = {}
    for request in workload.requests:
        for parent, name in zip((b"", *request.hashes), request.hashes, strict=False):
            assert parents.setdefault(name, parent) == parent, "a block has one prefix"
    assert 0.1 < workload.oracle_hit_rate() < 0.95


def test_generating_has_limits() -> None:
    with pytest.raises(WorkloadError, match="workload: must be one of shared-prefix, chat, sharegpt, got 'x'"):
        generate("x", 1, 512, 0)
    with pytest.raises(WorkloadError, match="num_requests: must be from 1 to 5000000"):
        generate("chat", 0, 512, 0)

"""Wrong requests over real HTTP: a clear error that names the field, and the next request is fine."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.helpers.cluster import MODEL, Cluster

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "hi"}
LENGTH = 512
LIMIT_BYTES = 4 << 20


@pytest.fixture(scope="module")
def cluster(small_model: Path) -> Iterator[Cluster]:
    gateway = {"max_model_len": LENGTH, "max_body_bytes": LIMIT_BYTES}
    with Cluster(small_model, gateway=gateway, dtype="float32", num_blocks=256, max_model_len=LENGTH) as cluster:
        yield cluster.start_workers()


@pytest.fixture(scope="module")
def http(cluster: Cluster) -> Iterator[httpx.Client]:
    """One connection for all: an error must not spoil what comes after it on the same one."""
    limits = httpx.Limits(max_connections=1)
    with httpx.Client(base_url=cluster.url, trust_env=False, timeout=60.0, limits=limits) as client:
        yield client


def assert_refused(http: httpx.Client, response: httpx.Response, status: int, param: str | None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["code"] is None or isinstance(error["code"], str)
    assert len(error["message"]) > 10
    fine = http.post(TEXT, json={"model": MODEL, "prompt": "the cat", "max_tokens": 2, "ignore_eos": True})
    assert fine.status_code == 200
    assert fine.json()["usage"]["completion_tokens"] == 2
    return error


BODIES: list[tuple[str, dict[str, Any], int, str | None]] = [
    (CHAT, {"messages": [USER], "model": "nobody"}, 404, "model"),
    (CHAT, {"messages": [USER], "model": 7}, 400, "model"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {}, 400, "messages"),
    (CHAT, {"messages": "hi"}, 400, "messages"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages[0].content"),
    (CHAT, {"messages": [{"role": "wizard", "content": "hi"}]}, 400, "messages[0].role"),
    (CHAT, {"messages": [{"role": "tool", "content": "hi", "tool_call_id": "x"}]}, 400, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "word " * 600}]}, 400, "messages"),
    (CHAT, {"messages": [USER], "n": 1_000_000}, 400, "n"),
    (CHAT, {"messages": [USER], "n": 0}, 400, "n"),
    (CHAT, {"messages": [USER], "max_tokens": 0}, 400, "max_tokens"),
    (CHAT, {"messages": [USER], "max_tokens": LENGTH + 1}, 400, "max_tokens"),
    (CHAT, {"messages": [USER], "max_completion_tokens": LENGTH + 1}, 400, "max_completion_tokens"),
    (CHAT, {"messages": [USER], "top_logprobs": 3}, 400, "top_logprobs"),
    (TEXT, {}, 400, "prompt"),
    (TEXT, {"prompt": ""}, 400, "prompt"),
    (TEXT, {"prompt": []}, 400, "prompt"),
    (TEXT, {"prompt": [1, "a"]}, 400, "prompt"),
    (TEXT, {"prompt": [1, 2, 100_000]}, 400, "prompt"),
    (TEXT, {"prompt": [-1]}, 400, "prompt"),
    (TEXT, {"prompt": [3] * LENGTH}, 400, "prompt"),
    (TEXT, {"prompt": [3] * 100_000}, 400, "prompt"),
    (TEXT, {"prompt": [3] * (LENGTH - 10), "max_tokens": 11}, 400, "max_tokens"),
    (TEXT, {"prompt": "hi", "max_tokens": -5}, 400, "max_tokens"),
    (TEXT, {"prompt": "hi", "max_tokens": 10**30}, 400, "max_tokens"),
    (TEXT, {"prompt": "hi", "max_tokens": "many"}, 400, "max_tokens"),
    (TEXT, {"prompt": "hi", "temperature": -1}, 400, "temperature"),
    (TEXT, {"prompt": "hi", "temperature": "warm"}, 400, "temperature"),
    (TEXT, {"prompt": "hi", "top_p": 0}, 400, "top_p"),
    (TEXT, {"prompt": "hi", "min_tokens": 20, "max_tokens": 10}, 400, "min_tokens"),
    (TEXT, {"prompt": "hi", "logit_bias": {"99999": 1}}, 400, "logit_bias"),
    (TEXT, {"prompt": "hi", "stop": ["x"] * 100}, 400, "stop"),
    (TEXT, {"prompt": "hi", "suffix": "there"}, 400, "suffix"),
    (TEXT, {"prompt": "hi", "stream_options": {"include_usage": True}}, 400, "stream_options"),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), BODIES, ids=[f"{i}-{b[3]}" for i, b in enumerate(BODIES)])
def test_a_wrong_body(http: httpx.Client, path: str, body: dict[str, Any], status: int, param: str | None) -> None:
    response = http.post(path, json={"model": MODEL, **body})
    assert_refused(http, response, status, param)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model":', b"[" * 100_000])
def test_what_is_not_json_or_no_object(http: httpx.Client, content: bytes) -> None:
    for path in (CHAT, TEXT):
        response = http.post(path, content=content, headers={"Content-Type": "application/json"})
        assert_refused(http, response, 400, None)


def test_a_body_of_twenty_megabytes(http: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": "x" * (20 << 20)}
    error = assert_refused(http, http.post(TEXT, json=body), 413, None)
    assert str(LIMIT_BYTES) in error["message"]


def test_a_body_of_twenty_megabytes_that_does_not_say_so(http: httpx.Client) -> None:
    response = http.post(TEXT, content=(b"x" * 65536 for _ in range(320)))
    assert_refused(http, response, 413, None)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "route_not_found"),
        ("POST", "/", 404, "route_not_found"),
        ("GET", TEXT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/ready", 405, "method_not_allowed"),
    ],
)
def test_routes_and_methods(http: httpx.Client, method: str, path: str, status: int, code: str) -> None:
    error = assert_refused(http, http.request(method, path), status, None)
    assert error["code"] == code


def test_a_model_that_is_not_listed(http: httpx.Client) -> None:
    error = assert_refused(http, http.get("/v1/models/nobody"), 404, "model")
    assert error["code"] == "model_not_found"


def test_what_is_not_http(cluster: Cluster, http: httpx.Client) -> None:
    for noise in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET\r\n\r\n", b"\x00" * 4096):
        with socket.create_connection(("127.0.0.1", cluster.port), timeout=30) as raw:
            raw.sendall(noise)
            raw.shutdown(socket.SHUT_WR)
            assert b" 200 " not in raw.recv(4096)
    assert_refused(http, http.get("/v1/nothing"), 404, None)


def test_a_cluster_with_a_key(small_model: Path) -> None:
    with Cluster(small_model, gateway={"api_key": "one-key,another"}, dtype="float32", num_blocks=256) as cluster:
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            answer = httpx.get(f"{cluster.url}/v1/models", headers=headers, trust_env=False)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        right = {"Authorization": "Bearer another"}
        assert httpx.get(f"{cluster.url}/v1/models", headers=right, trust_env=False).status_code == 200

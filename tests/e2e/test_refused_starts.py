"""A service that cannot work says why in one line, and ends."""

import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tailrace.cores import available_cores
from tests.helpers.cluster import Role, run_to_end
from tests.helpers.tiny_model import make_tiny_model

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

SECRET = "x" * 32


def assert_clear(role: Role, code: int, said: str, *words: str) -> None:
    """The last line is the reason; nobody sees a traceback."""
    assert code not in (0, None), said
    assert "Traceback" not in said, said
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"tailrace {role}:"), said
    assert all(word in last for word in words), said


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def scramble(path: Path) -> None:
    path.write_bytes(b"\xff" * 4096)


def remove_a_tensor(path: Path) -> None:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].replace(b"model.layers.1.mlp.up_proj", b"model.layers.9.mlp.up_proj")
    path.write_bytes(data[:8] + header + data[8 + size :])


def set_architecture(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["GPT2LMHeadModel"]}))


DAMAGES: list[tuple[Role, str, Callable[[Path], Any], str]] = [
    ("decode", "model.safetensors", shorten, "model.safetensors"),
    ("prefill", "model.safetensors", scramble, "model.safetensors"),
    ("decode", "model.safetensors", remove_a_tensor, "up_proj"),
    ("prefill", "model.safetensors", Path.unlink, "safetensors"),
    ("decode", "config.json", set_architecture, "GPT2LMHeadModel"),
    ("gateway", "config.json", scramble, "config.json"),
    ("gateway", "tokenizer.json", Path.unlink, "tokenizer"),
    ("gateway", "tokenizer.json", scramble, "tokenizer.json"),
]


@pytest.fixture(scope="module")
def starting() -> Iterator[Executor]:
    """They share nothing: as many at once as there are cores."""
    with ThreadPoolExecutor(len(available_cores())) as pool:
        yield pool


@pytest.fixture(scope="module")
def starts(starting: Executor, tmp_path_factory: pytest.TempPathFactory) -> list[Future[tuple[int, str]]]:
    """Of each of DAMAGES, how it ended."""
    begun = []
    for role, file, damage, _ in DAMAGES:
        model = make_tiny_model(tmp_path_factory.mktemp("damaged"))
        damage(model / file)
        begun.append(starting.submit(run_to_end, role, model=model, secret=SECRET, port=0))
    return begun


@pytest.mark.parametrize("number", range(len(DAMAGES)), ids=[f"{d[0]}-{d[1]}-{d[2].__name__}" for d in DAMAGES])
def test_a_damaged_model_directory(starts: list[Future[tuple[int, str]]], number: int) -> None:
    role, _, _, word = DAMAGES[number]
    code, said = starts[number].result()
    assert_clear(role, code, said, word)


def test_a_model_directory_that_is_not_there(tmp_path: Path) -> None:
    code, said = run_to_end("decode", model=tmp_path / "nothing", secret=SECRET)
    assert_clear("decode", code, said, "nothing")


PORTS: list[tuple[Role, str]] = [("gateway", "port"), ("gateway", "grpc_port"), ("prefill", "port"), ("decode", "port")]


def test_a_port_in_use(small_model: Path, starting: Executor) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        def start(role: Role, option: str) -> tuple[int, str]:
            options = {"model": small_model, "secret": SECRET, "port": 0, option: port}
            return run_to_end(role, **options)

        ended = list(starting.map(lambda each: start(*each), PORTS))
    for (role, _), (code, said) in zip(PORTS, ended, strict=True):
        assert_clear(role, code, said, str(port), "in use")


def test_no_secret(small_model: Path, starting: Executor) -> None:
    roles: list[Role] = ["gateway", "prefill", "decode"]
    ended = list(starting.map(lambda role: run_to_end(role, model=small_model, port=0), roles))
    for role, (code, said) in zip(roles, ended, strict=True):
        assert_clear(role, code, said, "TAILRACE_SECRET")


def test_an_unknown_setting(small_model: Path) -> None:
    code, said = run_to_end("decode", model=small_model, secret=SECRET, num_blok=3)
    assert code == 2
    assert said.strip() == "tailrace: unknown environment variable TAILRACE_NUM_BLOK; did you mean TAILRACE_NUM_BLOCKS?"

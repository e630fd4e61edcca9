import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from typer.testing import CliRunner

from tailrace import __version__
from tailrace.cli.main import app
from tests.helpers.fake_services import write_fake_services, write_model_directory

REPOSITORY = Path(__file__).parents[3]


def run(*arguments):
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.stdout, result.stderr


def command(*arguments):
    return [sys.executable, "-m", "tailrace.cli.main", *arguments]


def test_version():
    assert run("--version") == (0, f"tailrace {__version__}\n", "")


def test_every_command_has_help_and_none_of_it_loads_torch():
    code = """
import sys
from typer.testing import CliRunner
from tailrace.cli.main import app
BENCHES = ("bench engine", "bench serve", "bench handoff", "bench gateway", "bench interference", "bench accuracy")
for name in ("up", "gateway", "prefill", "decode", "chat", "demo", "doctor", "model", "bench", "simulate", *BENCHES):
    result = CliRunner().invoke(app, [*name.split(), "--help"])
    assert result.exit_code == 0 and "Usage" in result.output, (name, result.output)
print([name for name in ("torch", "transformers", "grpc", "fastapi") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize(
    "flag",
    ["--served-model-name", "--max-model-len", "--max-num-seqs", "--max-num-batched-tokens", "--block-size", "--dtype",
     "--host", "--port", "--api-key", "--load-format", "--prefill", "--decode", "--transport", "--no-restart"],
)  # fmt: skip
def test_up_has_the_flags_of_vllm_and_its_own(flag, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert flag in run("up", "--help")[1]


def test_a_secret_is_no_flag():
    assert "--secret" not in run("prefill", "--help")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("up", "--block-size", "7"), "block_size: must be one of 16, 32, 64, 128, got '7'"),
        (("up", "--decode", "0"), "decode: must be greater than or equal to 1, got '0'"),
        (("prefill", "--join", "nowhere"), "join: must be host:port, got 'nowhere'"),
        (("gateway", "--port", "70000"), "port: must be less than or equal to 65535, got '70000'"),
        (("up", "--config", "/nowhere.toml"), "No such file"),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(arguments, message, monkeypatch):
    monkeypatch.setenv("TAILRACE_CONFIG", "")
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("tailrace: ")
    assert err.count("\n") == 1


def test_an_unknown_model_is_exit_code_1(tmp_path):
    code, out, err = run("model", "path", str(tmp_path / "no-such-model"))
    assert (code, out) == (1, "")
    assert "no-such-model" in err


def test_model_path_prints_the_directory_and_nothing_else(tmp_path):
    directory = write_model_directory(tmp_path / "m")
    assert run("model", "path", str(directory)) == (0, f"{directory}\n", "")


def test_a_service_gets_its_settings_by_environment(tmp_path):
    room = tmp_path / "services" / "decode"
    room.mkdir(parents=True)
    for package in (room.parent, room):
        (package / "__init__.py").touch()
    (room / "main.py").write_text(
        "import json, os, sys; E = os.environ\n"
        "print(json.dumps([sys.argv[1:], {n: E[n] for n in E if 'TAILRACE' in n}]))"
    )
    done = subprocess.run(
        command("decode", "--join", "127.0.0.1:5", "--no-enable-prefix-caching", "--kv-cache-memory", "64MiB"),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "TAILRACE_BLOCK_SIZE": "32"},
        capture_output=True,
        text=True,
    )
    arguments, environment = json.loads(done.stdout)
    assert arguments == []
    assert environment == {
        "TAILRACE_JOIN": "127.0.0.1:5",
        "TAILRACE_PREFIX_CACHING": "False",
        "TAILRACE_KV_CACHE_MEMORY": str(64 << 20),
        "TAILRACE_BLOCK_SIZE": "32",
    }


class Up:
    """A `tailrace up` (or demo) with fake services, in its own process."""

    def __init__(self, tmp_path, *arguments, name="up"):
        model = write_model_directory(tmp_path / "m")
        self.process = subprocess.Popen(
            command(name, "--model", str(model), "--served-model-name", "tiny", *arguments),
            cwd=write_fake_services(tmp_path),
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said = ""

    def read_until(self, text):
        while text not in self.said:
            line = self.process.stdout.readline()
            assert line, self.said
            self.said += line
        return self.said

    def end(self):
        self.said += self.process.stdout.read()
        return self.process.wait(20)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()


def test_up_serves_until_ctrl_c_and_leaves_nothing(tmp_path):
    with Up(tmp_path, "--port", "0", "--decode", "2") as up:
        url = up.read_until("Ready in").rpartition("http://")[2].split()[0]
        children = psutil.Process(up.process.pid).children()
        assert len(children) == 4
        assert httpx.get(f"http://{url}/models", trust_env=False).json()["data"] == [{"id": "tiny"}]
        up.process.send_signal(signal.SIGINT)
        assert up.end() == 0
        assert not any(child.is_running() for child in children)
    assert "decode-1   | worker decode-1 speaks" in up.said
    assert "Traceback" not in up.said


def test_up_reports_a_dead_worker_and_starts_it_again(tmp_path):
    with Up(tmp_path, "--port", "0") as up:
        up.read_until("Ready in")
        [victim] = [c for c in psutil.Process(up.process.pid).children() if "services.prefill.main" in c.cmdline()]
        up.said = ""
        victim.kill()
        up.read_until("worker prefill-0 speaks")
        up.read_until("prefill-0 is started again in 0.5 s")
        up.said = ""
        up.read_until("worker prefill-0 speaks")
        up.process.send_signal(signal.SIGTERM)
        assert up.end() == 0


def test_up_fails_with_the_last_lines_of_a_worker_that_cannot_start(tmp_path):
    with Up(tmp_path, "--port", "0", "--device", "cuda", "--max-model-len", "77") as up:
        assert up.end() == 1
    assert "no GPU here" in up.said
    assert "cannot start" in up.said
    assert "Traceback" not in up.said


def test_up_on_a_port_in_use_is_one_line_at_once(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken, Up(tmp_path, "--port", str(taken.getsockname()[1])) as up:
        assert up.end() == 2
    assert up.said == f"tailrace: port: 127.0.0.1:{taken_port(up)} is in use; pass another --port\n"


def taken_port(up):
    return up.said.split(":")[3].split()[0]


def test_a_second_ctrl_c_kills_at_once(tmp_path):
    fakes = tmp_path / "services" / "decode"
    with Up(tmp_path, "--port", "0") as up:
        up.read_until("Ready in")
        (fakes / "main.py").write_text(
            "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
        )
        [decode] = [c for c in psutil.Process(up.process.pid).children() if "services.decode.main" in c.cmdline()]
        decode.kill()
        up.read_until("| deaf")
        up.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        began = time.monotonic()
        up.process.send_signal(signal.SIGINT)
        assert up.end() == 0
        assert time.monotonic() - began < 3


def test_demo_streams_an_answer_and_says_where_the_time_went(tmp_path):
    with Up(tmp_path, name="demo") as demo:
        assert demo.end() == 0
    assert "WHY IS THE SKY BLUE?" in demo.said
    assert "4.00 MB over stream, 2.00 GB/s" in demo.said
    assert "40 prompt tokens, 16 of them cached" in demo.said
    for row in ("queue", "prefill", "transfer", "decode", "TTFT", "TPOT"):
        assert row in demo.said
    assert "worker decode-0 speaks" not in demo.said

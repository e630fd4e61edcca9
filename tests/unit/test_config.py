import os

import pytest

from tailrace.config import GatewayConfig, UpConfig, WorkerConfig, base_environment
from tailrace.config_values import parse_bytes
from tailrace.errors import ConfigError

SECRET = "0123456789abcdef"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("TAILRACE_")]:
        monkeypatch.delenv(name)


def refusal(role, **values):
    with pytest.raises(ConfigError) as caught:
        role(**values)
    return caught.value


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("1GiB", 1 << 30), ("512 MiB", 512 << 20), ("1.5gib", 3 << 29), ("2GB", 2 * 10**9), ("64k", 64000), ("7", 7)],
)
def test_sizes_have_units(text, num_bytes):
    assert parse_bytes(text) == num_bytes


def test_arguments_beat_the_environment_and_that_beats_the_file(tmp_path, monkeypatch):
    file = tmp_path / "cluster.toml"
    file.write_text('block-size = 64\nmax_num_seqs = 5\nmodel = "from-file"\nprefill = 3\n')
    monkeypatch.setenv("TAILRACE_CONFIG", str(file))
    monkeypatch.setenv("TAILRACE_MAX_NUM_SEQS", "6")
    monkeypatch.setenv("TAILRACE_BLOCK_SIZE", "32")
    config = WorkerConfig(block_size=128)
    assert (config.block_size, config.max_num_seqs, config.model) == (128, 6, "from-file")
    assert UpConfig().prefill == 3


def test_an_unknown_variable_is_refused_with_the_nearest_known_one(monkeypatch):
    monkeypatch.setenv("TAILRACE_BLOKC_SIZE", "16")
    error = refusal(GatewayConfig)
    assert error.message == "unknown environment variable TAILRACE_BLOKC_SIZE; did you mean TAILRACE_BLOCK_SIZE?"


def test_a_variable_of_another_role_is_fine(monkeypatch):
    monkeypatch.setenv("TAILRACE_BLOCK_SIZE", "64")
    GatewayConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blok_size = 16", "unknown key blok_size; did you mean block_size?"),
        ("block_size = ", "Invalid value"),
        (None, "No such file"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, monkeypatch, text, message):
    file = tmp_path / "cluster.toml"
    if text is not None:
        file.write_text(text)
    monkeypatch.setenv("TAILRACE_CONFIG", str(file))
    error = refusal(WorkerConfig)
    assert str(file) in error.message
    assert message in error.message


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"block_size": 17}, "block_size"),
        ({"block_size": "many"}, "block_size"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_batched_tokens": 1e12}, "max_num_batched_tokens"),
        ({"kv_cache_memory": "lots"}, "kv_cache_memory"),
        ({"kv_cache_memory": -1}, "kv_cache_memory"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"dtype": "int3"}, "dtype"),
        ({"device": "tpu"}, "device"),
        ({"device": "cuda:1"}, "device"),
        ({"transport": "carrier-pigeon"}, "transport"),
        ({"port": 65536}, "port"),
        ({"join": "gateway"}, "join"),
        ({"join": "gateway:99999"}, "join"),
        ({"tls_ca": "/nowhere.pem"}, "tls_ca"),
        ({"secret": "short"}, "secret"),
        ({"host": "0.0.0.0"}, "secret"),
        ({"no_such": 1}, "no_such"),
    ],
)
def test_every_bound_names_its_field(values, param):
    error = refusal(WorkerConfig, **values)
    assert error.param == param
    assert error.message.startswith(param)


def test_a_wrong_secret_is_not_repeated():
    assert "hunter2" not in refusal(WorkerConfig, secret="hunter2").message


def test_a_child_gets_an_equal_configuration_through_the_environment(tmp_path, monkeypatch):
    pem = tmp_path / "x.pem"
    pem.touch()
    worker = WorkerConfig(
        secret=SECRET, join="127.0.0.1:5,[::1]:6", kv_cache_memory="512MiB", prefix_caching=False, threads=2,
        tls_cert=pem, tls_key=pem, served_model_name="a,b", max_model_len=4096,
    )  # fmt: skip
    gateway = GatewayConfig(api_key="k1,k2", workers="h:1", deadline_s=1.5, secret=SECRET)
    for config in (worker, gateway):
        with monkeypatch.context() as child:
            for name, value in config.to_environment().items():
                child.setenv(name, value)
            assert type(config)() == config


def test_only_what_differs_from_the_defaults_is_passed_on():
    assert WorkerConfig(block_size=32).to_environment() == {"TAILRACE_BLOCK_SIZE": "32"}


def test_secrets_do_not_show():
    config = GatewayConfig(api_key="sk-123", secret=SECRET)
    assert "sk-123" not in repr(config)
    assert SECRET not in repr(config)


def test_a_configuration_is_frozen():
    config = WorkerConfig()
    with pytest.raises(Exception, match="frozen"):
        config.block_size = 32


def test_up_gives_the_http_address_to_the_gateway_only():
    up = UpConfig(host="0.0.0.0", port=9000, block_size=32, secret=SECRET, max_model_len=512)
    gateway, worker = up.gateway(grpc_port=5), up.worker(join=("127.0.0.1:5",), threads=1)
    assert (gateway.host, gateway.port, gateway.grpc_port, gateway.max_model_len) == ("0.0.0.0", 9000, 5, 512)
    assert (worker.host, worker.port, worker.block_size, worker.join) == ("127.0.0.1", 0, 32, ("127.0.0.1:5",))


def test_served_names_default_to_the_model():
    assert GatewayConfig(model="org/name").model_names == ("org/name",)
    assert GatewayConfig(served_model_name="a, b").model_names == ("a", "b")


def test_main_prints_one_line_and_exits_2(capsys):
    with pytest.raises(SystemExit) as caught:
        WorkerConfig.or_exit(block_size=17)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "tailrace: block_size: must be one of 16, 32, 64, 128, got 17\n"


def test_children_start_from_an_environment_without_our_variables(monkeypatch):
    monkeypatch.setenv("TAILRACE_PORT", "1")
    assert "TAILRACE_PORT" not in base_environment()
    assert base_environment()["PATH"]


@pytest.mark.parametrize("url", ["http://user:hunter2@h", "redis://user:hunter2@h:99999", "redis://user:hunter2@"])
def test_a_wrong_redis_url_is_not_repeated(url):
    error = refusal(WorkerConfig, redis=url)
    assert error.param == "redis"
    assert "hunter2" not in error.message


def test_what_logs_may_not_show_of_redis(monkeypatch):
    monkeypatch.setenv("TAILRACE_REDIS", "redis://user:hunter2@h:1")
    config = WorkerConfig(secret=SECRET)
    assert "hunter2" not in repr(config)
    assert {"hunter2", "redis://user:hunter2@h:1", SECRET} == set(config.hidden)
    assert config.redis_url.address == "h:1"
    assert WorkerConfig(redis="").redis_url is None
    assert refusal(WorkerConfig, redis_namespace="a b").param == "redis_namespace"

import asyncio
import socket
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from tailrace.cli.cluster import Ports, free_port, http_url, num_workers, plan_children, running_cluster
from tailrace.cli.supervisor import ChildFailedError
from tailrace.config import UpConfig
from tailrace.cores import Machine
from tailrace.errors import ConfigError
from tailrace.messages import Load
from tailrace.telemetry.metrics import GatewayMetrics, WorkerSample, render
from tailrace.types import Role
from tests.helpers.fake_services import write_fake_services

MODEL = Path("/models/m")


def plan(cores=(0, 1, 2, 3), quota=None, **values):
    machine, config = Machine(cores, quota), UpConfig(**values)
    return {
        c.name: c
        for c in plan_children(config, MODEL, Ports(9000, 9001, 9002 if config.has_store else None), machine=machine)
    }


def test_each_role_is_a_process_of_its_own():
    children = plan(prefill=1, decode=2)
    assert list(children) == ["gateway", "prefill-0", "decode-0", "decode-1"]
    assert children["decode-1"].command == (sys.executable, "-m", "services.decode.main")


def test_a_store_is_started_where_one_is_asked_for_and_workers_are_told_of_it(tmp_path):
    assert "kvstore" not in plan()
    assert "TAILRACE_STORE" not in plan()["prefill-0"].environment
    children = plan(store_memory="2GiB", store_disk=tmp_path / "slab", store_disk_size="4GiB", transport="stream")
    assert list(children) == ["gateway", "kvstore", "prefill-0", "decode-0"]
    store = children["kvstore"]
    assert store.command == (sys.executable, "-m", "services.kvstore.main")
    said = {name.removeprefix("TAILRACE_"): value for name, value in store.environment.items()}
    assert (said["PORT"], said["JOIN"], said["TRANSPORT"]) == ("9002", "127.0.0.1:9001", "stream")
    assert (said["CPU_MEMORY"], said["DISK_PATH"]) == (str(2 << 30), str(tmp_path / "slab"))
    assert said["DISK_BYTES"] == str(4 << 30)
    assert said["SECRET"] == children["gateway"].environment["TAILRACE_SECRET"]
    for name in ("prefill-0", "decode-0"):
        assert children[name].environment["TAILRACE_STORE"] == "127.0.0.1:9002"


def test_a_disk_alone_makes_a_store_with_the_usual_memory(tmp_path):
    environment = plan(store_disk=tmp_path / "slab")["kvstore"].environment
    assert "TAILRACE_CPU_MEMORY" not in environment
    assert environment["TAILRACE_DISK_PATH"] == str(tmp_path / "slab")


def test_prefill_0_is_the_colocated_mode():
    assert list(plan(prefill=0)) == ["gateway", "decode-0"]


def test_workers_join_the_gateway_and_share_its_secret():
    children = plan()
    gateway, decode = children["gateway"].environment, children["decode-0"].environment
    assert gateway["TAILRACE_GRPC_PORT"] == "9001"
    assert decode["TAILRACE_JOIN"] == "127.0.0.1:9001"
    assert gateway["TAILRACE_SECRET"] == decode["TAILRACE_SECRET"]
    assert len(decode["TAILRACE_SECRET"]) >= 32
    assert plan()["gateway"].environment["TAILRACE_SECRET"] != gateway["TAILRACE_SECRET"]


def test_no_secret_is_in_a_command_line():
    for child in plan(secret="0123456789abcdef", api_key="sk-1").values():
        assert not {"0123456789abcdef", "sk-1"} & set(child.command)


def test_redis_is_passed_on_and_workers_get_names_that_no_other_cluster_has():
    children = plan(redis="redis://u:a-password@127.0.0.1:5", redis_namespace="mine")
    for child in children.values():
        assert child.environment["TAILRACE_REDIS"] == "redis://u:a-password@127.0.0.1:5"
        assert child.environment["TAILRACE_REDIS_NAMESPACE"] == "mine"
        assert "a-password" not in " ".join(child.command)
    assert children["decode-0"].environment["TAILRACE_WORKER_ID"].startswith("decode-0-")
    assert plan()["decode-0"].environment["TAILRACE_WORKER_ID"] == "decode-0"
    assert "TAILRACE_REDIS" not in plan()["decode-0"].environment


def test_the_model_is_passed_as_a_directory_and_served_under_its_name():
    for child in plan(model="org/name").values():
        assert child.environment["TAILRACE_MODEL"] == "/models/m"
        assert child.environment["TAILRACE_SERVED_MODEL_NAME"] == "org/name"


def test_cores_and_threads_are_divided_among_the_workers():
    children = plan(cores=(0, 1, 2), prefill=1, decode=1)
    assert (children["prefill-0"].cores, children["decode-0"].cores) == ((0, 1), (2,))
    assert children["prefill-0"].environment["OMP_NUM_THREADS"] == "2"
    assert children["prefill-0"].environment["TAILRACE_THREADS"] == "2"
    assert children["gateway"].cores == ()


def test_nobody_is_kept_to_cores_when_asked_not_to():
    assert plan(pin_cores=False)["decode-0"].cores == ()
    assert plan(pin_cores=False)["decode-0"].environment["TAILRACE_THREADS"] == "2"


def test_threads_are_counted_by_what_a_control_group_grants():
    decode = plan(cores=tuple(range(64)), quota=4.0)["decode-0"]
    assert (decode.cores, decode.environment["TAILRACE_THREADS"]) == ((), "2")


def test_no_variable_of_the_user_lets_idle_threads_spin_or_binds_all_workers_to_the_same_cores(monkeypatch):
    for name, value in (
        *(("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "infinity"), ("KMP_BLOCKTIME", "infinite")),
        *(("OMP_NUM_THREADS", "64"), ("OMP_PROC_BIND", "true"), ("GOMP_CPU_AFFINITY", "0")),
    ):
        monkeypatch.setenv(name, value)
    for name in ("prefill-0", "decode-0"):
        environment = plan(cores=(0, 1))[name].environment
        assert (environment["OMP_WAIT_POLICY"], environment["GOMP_SPINCOUNT"]) == ("PASSIVE", "0")
        assert (environment["KMP_BLOCKTIME"], environment["OMP_NUM_THREADS"]) == ("0", "1")
        assert not {"OMP_PROC_BIND", "GOMP_CPU_AFFINITY"} & set(environment)


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} is in use") as caught:
            free_port("127.0.0.1", port)
    assert caught.value.param == "port"
    assert free_port("127.0.0.1", port) == port


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:80"), ("0.0.0.0", "http://127.0.0.1:80"), ("::", "http://[::1]:80")],
)
def test_the_url_can_be_dialled(host, url):
    assert http_url(host, 80) == url


def test_workers_are_counted_from_the_metrics_of_the_gateway():
    registry = CollectorRegistry()
    GatewayMetrics(registry, lambda: [WorkerSample(f"p{i}", Role.PREFILL, Load()) for i in range(3)])
    assert num_workers(render(registry).decode(), "prefill") == 3
    assert num_workers(render(registry).decode(), "decode") == 0


class Silent:
    def line(self, name, text): ...

    def died(self, death, pause_s): ...


async def test_nothing_is_started_when_the_port_is_taken(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = UpConfig(port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match="is in use"):
            async with running_cluster(config, MODEL, Silent()):
                pytest.fail("must not start")


@pytest.fixture
def fake_services(tmp_path, monkeypatch):
    monkeypatch.chdir(write_fake_services(tmp_path))


async def test_a_cluster_is_there_when_its_gateway_says_so(fake_services):
    async with asyncio.timeout(20):
        async with running_cluster(UpConfig(port=0), MODEL, Silent()) as cluster:
            assert sorted(cluster.supervisor.pids) == ["decode-0", "gateway", "prefill-0"]
            assert cluster.api_url.endswith("/v1")
            assert cluster.started_in_s > 0
        assert cluster.supervisor.pids == {}


async def test_a_worker_that_cannot_start_fails_the_cluster(fake_services):
    async with asyncio.timeout(20):
        with pytest.raises(ChildFailedError, match=r"(?s)(prefill|decode)-0 cannot start.*no GPU here"):
            async with running_cluster(UpConfig(port=0, device="cuda", max_model_len=77), MODEL, Silent()):
                pytest.fail("must not be ready")

import ctypes
import os
import subprocess
import sys

import pytest

from tailrace.errors import TransferError
from tailrace.transfer import nixl, open_transfer
from tailrace.transfer.proof import boot_id, rdma_devices, read_process
from tests.helpers.transfer_pools import make_options, make_pool

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="cross-memory attach is Linux's")


@on_linux
def test_our_own_memory_can_be_read_and_a_hole_cannot() -> None:
    buffer = ctypes.create_string_buffer(b"nonce of this process")
    assert read_process(os.getpid(), ctypes.addressof(buffer), 21) == b"nonce of this process"
    with pytest.raises(OSError, match="Bad address"):
        read_process(os.getpid(), 8, 21)


@on_linux
def test_a_host_has_a_boot_id() -> None:
    assert len(boot_id()) == 36
    assert rdma_devices("lo") == ()


@pytest.mark.parametrize(
    ("ucx_tls", "allowed"),
    [("tcp,cma", True), ("all", True), ("tcp,sm", True), ("rc,tcp", False), ("^cma", False), ("^ib", True)],
)
def test_cross_memory_attach_follows_ucx_tls(ucx_tls: str, allowed: bool) -> None:
    assert nixl.can_attach(ucx_tls) is allowed


def test_importing_the_room_imports_no_nixl() -> None:
    code = "import sys, tailrace.transfer; print({'torch', 'nixl', 'nixl_cu12', 'nixl_cu13'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


async def test_without_nixl_there_is_a_stream_and_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl, "_MODULES", ("a_module_that_is_not_there",))
    plane = await open_transfer(make_pool(), make_options())
    assert plane.owner.endpoints().nixl is None
    assert plane.owner.endpoints().stream is not None
    await plane.close()
    with pytest.raises(TransferError, match="nixl is not installed"):
        await open_transfer(make_pool(), make_options(preference="nixl"))


async def test_a_network_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nixl_cu12")
    monkeypatch.setenv("UCX_NET_DEVICES", "nope0")
    with pytest.raises(TransferError, match=r"nixl could not start.*UCX_NET_DEVICES=nope0"):
        await open_transfer(make_pool(), make_options(preference="nixl"))

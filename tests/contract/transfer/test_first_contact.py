"""Who may read, and over what: secrets, proofs, fallbacks and what they say."""

import asyncio
import dataclasses
import json
import logging
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tailrace.errors import LayoutMismatchError, TransferError, UnauthenticatedError
from tailrace.messages import LinkCount
from tailrace.transfer import ReadOutcome, TlsFiles, open_transfer
from tests.helpers.transfer_pools import make_options, make_pool, make_reads, peer_to_json
from tests.helpers.transfer_worker import worker


async def test_a_needer_with_another_secret_is_refused_and_the_owner_goes_on() -> None:
    async with worker("owner", seed=3, preference="stream") as owner:
        peer = await owner.meet()
        stranger = await open_transfer(make_pool(), make_options(preference="stream", secret=b"another cluster's"))
        with pytest.raises(UnauthenticatedError, match="same cluster secret"):
            await stranger.needer.connect(peer)
        friend = await open_transfer(make_pool(), make_options(preference="stream"))
        link = await friend.needer.connect(peer)
        assert (await link.read(make_reads(peer, [0], [0])).wait(5)).outcome is ReadOutcome.GOOD
        await stranger.close()
        await friend.close()


async def test_an_owner_whose_nonce_is_not_there_is_read_over_a_stream(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="tailrace.transfer")
    async with worker("owner", seed=3) as owner:
        plane = await open_transfer(make_pool(), make_options())
        peer = await owner.meet()
        forged = dataclasses.replace(peer, nixl=dataclasses.replace(peer.nixl, nonce=bytes(32)))
        assert (await plane.needer.connect(forged)).transport == "stream"
        plane.needer.forget("owner", 1)
        assert (await plane.needer.connect(forged)).transport == "stream"
        assert plane.needer.links() == (LinkCount("stream", "no_way", 1),)
        await plane.close()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "the nonce read by process_vm_readv is not the owner's" in warnings[0]
    assert "needer reads from owner over stream" in caplog.messages


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"nonce": bytes(32)}, "nonce read by process_vm_readv is not the owner's"),
        ({"boot_id": "another"}, "another host"),
        ({"pid": 2**22 + 1}, "cannot be read by process_vm_readv: No such process"),
        ({"agent_name": "someone"}, "not of someone"),
        ({"agent_metadata": b"nonsense"}, "nixlMismatchError"),
        ({"memory": "vram"}, "GPU memory"),
    ],
)
async def test_nixl_that_cannot_be_proved_is_refused_by_reason_where_it_is_demanded(change: dict, reason: str) -> None:
    async with worker("owner", seed=3) as owner:
        plane = await open_transfer(make_pool(), make_options(preference="nixl"))
        peer = await owner.meet()
        forged = dataclasses.replace(peer, nixl=dataclasses.replace(peer.nixl, **change))
        with pytest.raises(TransferError, match=reason):
            await plane.needer.connect(forged)
        with pytest.raises(TransferError, match="the owner does not offer it"):
            await plane.needer.connect(dataclasses.replace(peer, nixl=None))
        assert (await plane.needer.connect(peer)).transport == "nixl"
        await plane.close()


async def test_a_stopped_owner_fails_the_contact_within_its_deadlines() -> None:
    async with worker("owner", seed=3) as owner:
        options = make_options(proof_timeout_s=0.3, handshake_timeout_s=0.3)
        plane = await open_transfer(make_pool(), options)
        peer = await owner.meet()
        owner.stop()
        with pytest.raises(TransferError, match="handshake failed"):
            await plane.needer.connect(peer)
        owner.go_on()
        await plane.close()


@pytest.mark.parametrize("after_s", [0.0, 0.003, 0.01])
async def test_an_owner_stopped_in_a_contact_holds_nobody_up(after_s: float) -> None:
    async with worker("owner", seed=3) as owner:
        plane = await open_transfer(make_pool(), make_options(preference="nixl", proof_timeout_s=0.3))
        contact = asyncio.create_task(plane.needer.connect(await owner.meet()))
        await asyncio.sleep(after_s)
        owner.stop()
        done, _ = await asyncio.wait({contact}, timeout=2)
        owner.go_on()
        assert done
        assert isinstance(contact.exception(), TransferError | None)
        await plane.close()


async def test_a_busy_machine_and_a_stalled_owner_still_get_nixl() -> None:
    async with worker("owner", seed=3) as owner, spinning(4):
        plane = await open_transfer(make_pool(), make_options(preference="nixl"))
        peer = await owner.meet()
        stalled = asyncio.create_task(owner.call("stall", seconds=0.2))
        await asyncio.sleep(0)
        link = await plane.needer.connect(peer)
        await stalled
        owner.stop()
        result = await link.read(make_reads(peer, [0, 3], [8, 9])).wait(10)
        owner.go_on()
        assert result is not None
        assert result.outcome is ReadOutcome.GOOD
        await plane.close()


@asynccontextmanager
async def spinning(num_processes: int) -> AsyncIterator[None]:
    command = (sys.executable, "-c", "while True: pass")
    processes = [await asyncio.create_subprocess_exec(*command) for _ in range(num_processes)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            await process.wait()


async def test_another_worker_on_the_owners_port_is_not_taken_for_it() -> None:
    async with worker("owner", epoch=2, preference="stream") as owner:
        plane = await open_transfer(make_pool(), make_options(preference="stream"))
        peer = await owner.meet()
        with pytest.raises(TransferError, match="answers instead of"):
            await plane.needer.connect(dataclasses.replace(peer, epoch=1))
        with pytest.raises(LayoutMismatchError, match="block_bytes: owner=8192 needer=4096"):
            await plane.needer.connect(dataclasses.replace(peer, block_bytes=8192))
        await plane.close()


NIXL_OVER_TCP = """
import asyncio, json, os, sys
os.environ["UCX_TLS"] = "tcp"
from tailrace.errors import TransferError
from tailrace.transfer import Needer
from tailrace.transfer.nixl import start_nixl
from tests.helpers.transfer_pools import make_options, make_pool, peer_from_json

async def main():
    pool, options = make_pool(), make_options(preference="nixl")
    driver = start_nixl(pool, options, "reads")
    driver.can_attach |= "--pretend" in sys.argv
    try:
        await Needer(pool, options, driver).connect(peer_from_json(json.loads(sys.argv[1])))
    except TransferError as error:
        print(error.message)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("flags", "reason"),
    [([], "UCX_TLS leaves out cma"), (["--pretend"], "nixl reads with the owner's help, as over TCP")],
)
async def test_nixl_never_reads_over_tcp_whatever_it_is_told(
    flags: list[str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    async with worker("owner", seed=3) as owner:
        peer = await owner.meet()
        command = ["-c", NIXL_OVER_TCP, json.dumps(peer_to_json(peer)), *flags]
        needer = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=subprocess.PIPE)
        output, _ = await asyncio.wait_for(needer.communicate(), 30)
        assert reason in output.decode()


@pytest.mark.parametrize("at_once", [False, True], ids=["in turn", "at once"])
async def test_two_workers_that_read_each_other_do_so_without_each_others_help(at_once: bool) -> None:
    async with worker("a", seed=3) as a, worker("b", seed=4) as b:
        ends = [(a, b, await b.meet()), (b, a, await a.meet())]
        contacts = [needer.call("connect", peer=peer_to_json(peer)) for needer, _, peer in ends]
        transports = await asyncio.gather(*contacts) if at_once else [await contact for contact in contacts]
        assert transports == ["nixl", "nixl"]
        for needer, owner, peer in ends:
            owner.stop()
            await needer.start_read("x", peer, make_reads(peer, [0, 3], [8, 9]))
            result = await needer.call("wait", name="x", timeout_s=5)
            owner.go_on()
            assert result == ["good", ""], "a read that waits for its owner is emulated over TCP"


async def test_a_link_is_counted_by_its_transport_and_by_why_that_is_not_nixl() -> None:
    async with worker("owner", seed=3) as owner:
        plane = await open_transfer(make_pool(), make_options())
        peer = await owner.meet()
        assert plane.needer.links() == ()
        await plane.needer.connect(peer)
        assert plane.needer.links() == (LinkCount("nixl", "", 1),)
        plane.needer.forget("owner", 1)
        await plane.needer.connect(dataclasses.replace(peer, nixl=None))
        assert plane.needer.links() == (LinkCount("stream", "not_offered", 1),)
        plane.needer.forget("owner", 1)
        forged = dataclasses.replace(peer.nixl, agent_name="someone")
        await plane.needer.connect(dataclasses.replace(peer, nixl=forged))
        assert plane.needer.links() == (LinkCount("stream", "unproved", 1),)
        await plane.close()
        streams = await open_transfer(make_pool(), make_options(preference="stream"))
        await streams.needer.connect(peer)
        assert streams.needer.links() == (LinkCount("stream", "configured", 1),)
        await streams.close()


async def test_two_ends_with_certificates_read_under_tls(tmp_path: Path) -> None:
    files = make_certificate(tmp_path)
    pool = make_pool()
    owner = await open_transfer(make_pool(seed=3), make_options("owner", preference="stream", tls=files))
    needer = await open_transfer(pool, make_options(preference="stream", tls=files))
    peer = owner.owner.endpoints()
    assert peer.stream.tls
    link = await needer.needer.connect(peer)
    result = await link.read(make_reads(peer, [3, 4, 9], [1, 2, 0])).wait(5)
    assert result.outcome is ReadOutcome.GOOD
    assert pool.bytes_of(0) == make_pool(seed=3).bytes_of(9)
    plain = await open_transfer(make_pool(), make_options("plain", preference="stream"))
    with pytest.raises(TransferError, match="TLS: owner=True needer=False"):
        await plain.needer.connect(peer)
    for plane in (needer, plain, owner):
        assert await plane.close()


async def test_a_certificate_of_another_authority_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    ours, theirs = make_certificate(tmp_path / "a"), make_certificate(tmp_path / "b")
    owner = await open_transfer(make_pool(seed=3), make_options("owner", preference="stream", tls=ours))
    needer = await open_transfer(make_pool(), make_options(preference="stream", tls=theirs))
    with pytest.raises(TransferError, match=r"handshake failed.*certificate"):
        await needer.needer.connect(owner.owner.endpoints())
    await needer.close()
    await owner.close()


def make_certificate(directory: Path) -> TlsFiles:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl to make a certificate with")
    files = TlsFiles(directory / "cert.pem", directory / "key.pem", directory / "cert.pem")
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    about = ["-nodes", "-days", "2", "-subj", "/CN=tailrace", "-keyout", files.key, "-out", files.cert]
    subprocess.run([openssl, "req", "-x509", *curve, *about], check=True, capture_output=True)
    return files


async def test_strangers_on_the_port_are_hung_up_on() -> None:
    options = make_options("owner", preference="stream", handshake_timeout_s=0.3, max_connections=1)
    plane = await open_transfer(make_pool(seed=3), options)
    peer = plane.owner.endpoints()
    address = (peer.stream.host, peer.stream.port)
    with socket.create_connection(address) as garbage:
        garbage.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(200))
        assert_hung_up(garbage)
    with socket.create_connection(address) as silent, socket.create_connection(address) as one_too_many:
        assert_hung_up(one_too_many)
        assert_hung_up(silent)
    needer = await open_transfer(make_pool(), make_options(preference="stream"))
    link = await needer.needer.connect(peer)
    assert (await link.read(make_reads(peer, [0], [0])).wait(5)).outcome is ReadOutcome.GOOD
    await needer.close()
    await plane.close()


def assert_hung_up(sock: socket.socket) -> None:
    sock.settimeout(5)
    try:
        while sock.recv(1024):
            pass
    except ConnectionResetError:
        pass

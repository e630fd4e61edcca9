"""The stream's frames and handshake over socket pairs: what is refused, and how."""

import socket
import struct
import threading
import time
from collections.abc import Callable

import pytest

from tailrace.errors import ConfigError, UnauthenticatedError
from tailrace.transfer.frames import (
    MAX_RUNS,
    ProtocolError,
    ReplyStatus,
    encode_refusal,
    encode_request,
    receive_bytes,
    receive_reply,
    receive_request,
)
from tailrace.transfer.handshake import Side, admit_needer, greet_owner
from tailrace.transfer.options import TransferOptions
from tailrace.transfer.reads import BlockRun
from tailrace.transfer.stream_server import StreamServer
from tests.helpers.transfer_pools import SECRET, make_options, make_pool

OWNER = Side("owner", 7, 4096, 32)
NEEDER = Side("needer", 3)


def in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    results: list[object] = []

    def run() -> None:
        try:
            results.append(work())
        except (UnauthenticatedError, ProtocolError, OSError) as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def shake(owner_secret: bytes, needer_secret: bytes) -> tuple[object, object]:
    """What each end learned of the other, or its error."""
    ours, theirs = socket.socketpair()
    deadline = time.monotonic() + 2

    def admit() -> Side:
        with theirs:
            return admit_needer(theirs, owner_secret, OWNER, deadline)

    thread, admitted = in_thread(admit)
    with ours:
        greeter, greeted = in_thread(lambda: greet_owner(ours, needer_secret, NEEDER, deadline))
        greeter.join()
    thread.join()
    return admitted[0], greeted[0]


def test_both_ends_learn_who_the_other_is() -> None:
    assert shake(SECRET, SECRET) == (NEEDER, OWNER)


def test_neither_end_accepts_another_secret() -> None:
    admitted, greeted = shake(SECRET, SECRET + b"x")
    assert isinstance(admitted, UnauthenticatedError)
    assert isinstance(greeted, UnauthenticatedError)


def test_an_owner_that_echoes_proofs_is_not_believed() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        thread, greeted = in_thread(lambda: greet_owner(ours, SECRET, NEEDER, time.monotonic() + 2))
        theirs.sendall(theirs.recv(4096))
        theirs.sendall(receive_bytes(theirs, 32))
        thread.join()
    assert isinstance(greeted[0], UnauthenticatedError)


def test_a_handshake_that_drips_ends_at_its_deadline() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        thread, admitted = in_thread(lambda: admit_needer(theirs, SECRET, OWNER, time.monotonic() + 0.2))
        started = time.monotonic()
        while thread.is_alive() and time.monotonic() - started < 5:
            ours.sendall(b"T")
            thread.join(0.05)
    assert isinstance(admitted[0], TimeoutError)


@pytest.mark.parametrize("head", [b"GET / HTTP/1.1", b"TRKV\x09\x00\x04\x00", b"TRKV\x01\x00\xff\xff"])
def test_a_handshake_of_another_kind_is_refused(head: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(head + bytes(100))
        with pytest.raises(ProtocolError, match="handshake"):
            admit_needer(theirs, SECRET, OWNER, time.monotonic() + 1)


def test_a_request_travels() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(encode_request([BlockRun(3, 0, 9, 2), BlockRun(8, 0, 1, 1)]))
        assert receive_request(theirs) == [(3, 2), (8, 1)]


@pytest.mark.parametrize(("magic", "num_runs"), [(b"NOPE", 1), (b"TRKV", 0), (b"TRKV", MAX_RUNS + 1)])
def test_a_request_out_of_bounds_is_refused_before_it_is_read(magic: bytes, num_runs: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(magic + struct.pack("<I", num_runs))
        with pytest.raises(ProtocolError):
            receive_request(theirs)


def test_too_many_runs_are_misuse() -> None:
    with pytest.raises(ValueError, match=f"at most {MAX_RUNS}"):
        encode_request([BlockRun(0, 0, 0, 1)] * (MAX_RUNS + 1))


def test_replies_are_bounded() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(encode_refusal("x" * 5000))
        assert receive_reply(theirs).count == 1024
        receive_bytes(theirs, 1024)
        for frame in (b"TRKV" + struct.pack("<II", 7, 0), b"TRKV" + struct.pack("<II", ReplyStatus.REFUSED, 5000)):
            ours.sendall(frame)
            with pytest.raises(ProtocolError):
                receive_reply(theirs)


def test_a_port_in_use_is_a_config_error() -> None:
    first = StreamServer(make_pool(), make_options("a"))
    with pytest.raises(ConfigError, match="transfer port 127") as raised:
        StreamServer(make_pool(), make_options("b", stream_port=first.endpoint().port))
    assert raised.value.param == "stream_port"
    first.close()


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"secret": b"short"}, "secret"),
        ({"preference": "rdma"}, "transport"),
        ({"worker_id": ""}, "worker_id"),
        ({"worker_id": "w" * 256}, "worker_id"),
        ({"epoch": -1}, "epoch"),
        ({"stream_port": 65_536}, "stream_port"),
    ],
)
def test_options_that_can_never_work_are_named(change: dict, param: str) -> None:
    with pytest.raises(ConfigError) as raised:
        make_options(**change)
    assert raised.value.param == param
    assert isinstance(make_options(), TransferOptions)
    assert SECRET.decode() not in repr(make_options())

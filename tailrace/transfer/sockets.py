"""Options of a stream's sockets, the same at both ends."""

import contextlib
import socket

_KEEPALIVE = (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3))
"""A peer whose machine is gone sends no reset: it is noticed after about 11 s."""


def configure(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        option = getattr(socket, name, None)
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def hang_up(sock: socket.socket) -> None:
    """End the connection from any thread; the thread that uses it wakes with an error or EOF, and closes it.

    The descriptor stays open until then, so that its number cannot come to mean another file under that thread.
    """
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)

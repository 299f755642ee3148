"""Copy bytes between two connections, in both directions."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl

_CHUNK = 64 * 1024
IDLE_S = 300.0
SEND_S = 30.0


def splice(one: socket.socket, other: socket.socket) -> None:
    """Copy until one side closes, is silent for `IDLE_S`, or does not read for `SEND_S`.

    One thread does both directions, because a TLS connection must not be used by two threads.
    """
    with contextlib.suppress(OSError):
        while readable := _wait(one, other):
            for source in readable:
                if not _copy(source, other if source is one else one):
                    return


def _wait(*connections: socket.socket) -> list[socket.socket]:
    """Return the connections with data. A TLS connection may hold decrypted data that the kernel does not know of."""
    pending: list[socket.socket] = [
        each for each in connections if isinstance(each, ssl.SSLSocket) and each.pending()
    ]
    return pending or select.select(connections, (), (), IDLE_S)[0]


def _copy(source: socket.socket, target: socket.socket) -> bool:
    """Copy the data that is there; return False at the end of the connection."""
    source.setblocking(False)
    try:
        data = source.recv(_CHUNK)
    except (ssl.SSLWantReadError, BlockingIOError):
        return True
    target.settimeout(SEND_S)
    target.sendall(data)
    return bool(data)
